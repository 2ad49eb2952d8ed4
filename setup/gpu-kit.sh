#!/usr/bin/env bash
# Packs what measures a GPU on a bare machine: $1 is the folder of the programs, $2 that of `make runtime`
# with the Python references, $3 the folder to fill; ONNX Runtime's CUDA provider, which is as large as all the
# rest, goes into the folder $3-cuda. There are needed: Python 3.12 with torch 2.11 for CUDA 13, peft and
# transformers; no network, no Rust. What else the peers need travels as wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=$(cd "$1" && pwd)
runtime=$(cd "$2" && pwd)
mkdir -p "$3" "$3-cuda"
out=$(cd "$3" && pwd)
ARCHITECTURE=${ARCHITECTURE:-90}

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

# pack FOLDER ARCHIVE: whole or not at all, and not above what one transfer takes
pack() {
  tar -C "$1" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -c . | xz -T0 -9 > "$2.part"
  mv "$2.part" "$2"
  local size
  size=$(du -s --apparent-size --block-size=1000000 "$(dirname "$2")" | cut -f 1)
  [ "$size" -lt 60 ] || { echo "error: $(dirname "$2") has $size MB, 60 are the limit" >&2; exit 1; }
  echo "$(dirname "$2"): $size MB"
}
cp setup/gpu.sh "$out/gpu.sh"
pack "$root" "$out/kit.tar.xz"

# Of its machine code only the part for one architecture, 90 for H100 and H200.
"$runtime/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --python-version 3.12 \
  --only-binary :all: --dest "$work/cuda" --requirement setup/requirements-gpu-provider.txt
"$runtime/venv/bin/python" -m zipfile -e "$work"/cuda/*.whl "$work/cuda/whole"
capi=$work/cuda/whole/onnxruntime/capi provider=$work/provider
mkdir "$provider"
cp "$capi"/libonnxruntime.so.* "$provider/libonnxruntime.so"
cp "$capi/libonnxruntime_providers_shared.so" "$work"/cuda/whole/onnxruntime/{LICENSE,ThirdPartyNotices.txt} "$provider/"
name=libonnxruntime_providers_cuda.so
python3 setup/gpu/trim.py "$capi/$name" "$provider/$name" "$ARCHITECTURE"
pack "$provider" "$out-cuda/provider.tar.xz"
