#!/usr/bin/env bash
# Builds ng-engine and engines of TensorRT for RTX for sm_89 and sm_120, of a tiny model and of one double-stream
# and one single-stream block of FLUX.1-dev's width, on a machine that needs no GPU. What is of data-centre
# TensorRT is compiled and not run. $1 is the runtime folder, $2 that of the programs, $3 the folder to fill.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runtime=$1 programs=$2 out=$3
cd "$here/.."

"$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --only-binary :all: --upgrade --target "$runtime/rtx" --requirement "$here/requirements-rtx.txt"
library=$runtime/rtx/tensorrt_rtx_libs
LIBCLANG_PATH=$(cd "$runtime/rtx/clang/native" && pwd)
BINDGEN_EXTRA_CLANG_ARGS="-I$(gcc -print-file-name=include)"
export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS
# Both libraries' headers define the same names: they are never built together. The last call leaves the program,
# which its tests run; each call compiles the binding again.
cargo test --release --locked --manifest-path rtx/Cargo.toml --features enterprise
cargo test --release --locked --manifest-path rtx/Cargo.toml

rm -rf "$out" && mkdir -p "$out"
cp -r tests/fixtures/tiny-flux/pipeline "$out/tiny-model"
# FLUX.1-dev with one block of each kind; text encoders and tokenizers are no part of the matter.
cp -r flow/src/known/flux.1-dev "$out/like"
cp -r assets/signs/tokenizer assets/signs/tokenizer_2 "$out/like"
python3 setup/gpu/blocks.py "$out/like" 1,1 1
"$programs/ng-train" init --like "$out/like" --out "$out/wide-model"

engines() { # engines NAME OPTIONS...
  local name=$1
  shift
  "$programs/ng-export" "$out/$name-model" --out "$out/$name" --target tensorrt-rtx \
    --precision bf16 --only transformer
  local graph=$out/$name/transformer/model.onnx
  rtx/target/release/ng-engine "$graph" --architecture 89,120 --library "$library" "$@"
  for sm in 89 120; do
    [ "$(head -c 4 "${graph%.onnx}.sm$sm.plan")" = vtrt ]
    "$programs/ng-export" wrap "${graph%.onnx}.sm$sm.plan" --graph "$graph" --architecture "$sm" \
      --out "${graph%.onnx}.sm$sm.onnx"
  done
}
engines tiny --size 64,96,128 --text 77
engines wide
