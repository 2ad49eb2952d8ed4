#!/usr/bin/env bash
# Packs what measures a GPU on a bare machine: $1 is the folder of the programs, $2 that of `make runtime`
# with the Python references, $3 the folder to fill. There are needed: Python 3.12 with torch 2.11 for CUDA 13,
# peft and transformers; no network, no Rust. What else the peers need travels as wheels. There are two archives,
# because the ways into such a machine take 64 MiB at a time: kit.tar.xz, and cuda.tar.xz with ONNX Runtime's CUDA
# provider for Hopper (SM names another architecture), which the parts export and sample need.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=$(cd "$1" && pwd)
runtime=$(cd "$2" && pwd)
mkdir -p "$3"
out=$(cd "$3" && pwd)

. setup/debian.sh
need patchelf command -v patchelf
need xz-utils command -v xz
need binutils command -v strip
install_missing

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/kit
mkdir -p "$root/bin" "$root/lib" "$root/wheels" "$root/.runtime/models" "$root/peers"
for program in ng-train ng-train-libtorch ng-export ng-sample cluster-rank; do
  strip -o "$root/bin/$program" "$programs/$program"
done
# libtorch is the one of the Python there, which gpu.sh names in LD_LIBRARY_PATH.
for program in ng-train-libtorch cluster-rank; do patchelf --set-rpath '$ORIGIN/../lib' "$root/bin/$program"; done
cp -L "$runtime/lib/libonnxruntime.so" "$root/lib/"
cp -L "$runtime/models/ocr-v6.onnx" "$root/.runtime/models/"
mkdir -p "$root/assets" "$root/tests/fixtures/tiny-flux"
cp -r assets/signs assets/prompts "$root/assets/"
cp -r tests/fixtures/tiny-flux/pipeline "$root/tests/fixtures/tiny-flux/"
cp -r flow/src/known/flux.1-dev "$root/"
cp benches/peers/flux_eager.py setup/gpu/*.py "$root/peers/"
cp LICENSE-APACHE LICENSE-MIT "$root/"
awk '/^[^ ]/ { on = /^diffusers==/ } on' setup/requirements-parity.txt > "$work/wheels.txt"
"$runtime/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
  --only-binary :all: --dest "$root/wheels" --requirement "$work/wheels.txt" \
  --requirement setup/requirements-gpu-kit.txt

# Of seven architectures' code one fits.
"$runtime/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --dest "$work/ort" --requirement setup/requirements-gpu-kit-cuda.txt
"$runtime/venv/bin/python" -m zipfile -e "$work"/ort/*.whl "$work/ort"
library=$work/ort/onnxruntime/capi
mkdir "$work/cuda"
cp "$library"/libonnxruntime.so.* "$work/cuda/libonnxruntime.so"
cp "$library/libonnxruntime_providers_shared.so" "$work/cuda/"
python3 setup/trim_cuda.py "$library/libonnxruntime_providers_cuda.so" "${SM:-90}" \
  "$work/cuda/libonnxruntime_providers_cuda.so"

pack() { # pack FOLDER NAME
  tar -C "$1" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -c . |
    xz -T0 -6 > "$out/$2.part"
  mv "$out/$2.part" "$out/$2"
  local size
  size=$(stat -c %s "$out/$2")
  [ "$size" -lt $((64 << 20)) ] || { echo "error: $out/$2 has $size bytes, 64 MiB are the limit" >&2; exit 1; }
  echo "$out/$2: $((size / 1000000)) MB"
}
cp setup/gpu.sh "$out/gpu.sh"
pack "$root" kit.tar.xz
pack "$work/cuda" cuda.tar.xz
