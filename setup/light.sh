#!/usr/bin/env bash
# Installs into the folder $1 what building, testing and the demo need: libtorch and its headers,
# ONNX Runtime and the OCR models, all out of Python packages whose Python code is never run.
# Safe to interrupt and to repeat; the caller marks completion with a stamp.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
runtime=$(cd "$1" && pwd)

exec 9> "$runtime/lock"
flock 9

. "$here/debian.sh"
need g++ command -v c++
need "python3 python3-venv" python3 -c 'import ensurepip, venv'
install_missing
command -v cargo > /dev/null || {
  echo "error: no cargo on the path: install Rust 1.92 or newer with rustup" >&2
  exit 1
}

"$runtime/venv/bin/python" -m pip --version > /dev/null 2>&1 ||
  python3 -m venv --clear "$runtime/venv"
# One of the packages refuses newer Pythons for the sake of code that is not used here.
"$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --only-binary :all: --ignore-requires-python --requirement "$here/requirements-light.txt"

"$here/libtorch.sh" "$runtime"

packages=$(cd "$runtime" && echo venv/lib/python3*/site-packages)
link() { # link FILE-PATTERN-UNDER-PACKAGES LINK-UNDER-RUNTIME
  local found
  found=$(compgen -G "$runtime/$packages/$1" | head -n 1) || {
    echo "error: no $1 in $runtime/$packages: remove $runtime and run \`make runtime\` again" >&2
    exit 1
  }
  mkdir -p "$(dirname "$runtime/$2")"
  ln -sfn "../${found#"$runtime/"}" "$runtime/$2"
}
link "onnxruntime/capi/libonnxruntime.so.[0-9]*" lib/libonnxruntime.so
link rapidocr/models/PP-OCRv6_rec_small.onnx models/ocr-v6.onnx
link rapidocr/models/PP-OCRv6_det_small.onnx models/ocr-detector-v6.onnx
link rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx models/ocr-v4.onnx
