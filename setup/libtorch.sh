#!/usr/bin/env bash
# Lays out $1/libtorch as the build script of `tch` expects it: headers, and a library folder in
# which -ltorch resolves to libtorch_cpu alone, so that one binary serves machines with and
# without CUDA. Links are relative: the folder may be moved.
set -euo pipefail
runtime=$(cd "$1" && pwd)
torch=$(cd "$runtime" && echo venv/lib/python3*/site-packages/torch)
[ -f "$runtime/$torch/lib/libtorch_cpu.so" ] || {
  echo "error: no torch under $runtime/venv: run \`make runtime\`" >&2
  exit 1
}
mkdir -p "$runtime/libtorch/lib"
ln -sfn "../$torch/include" "$runtime/libtorch/include"
for library in libc10.so libtorch_cpu.so libgomp.so.1; do
  ln -sfn "../../$torch/lib/$library" "$runtime/libtorch/lib/$library"
done
echo 'INPUT(-ltorch_cpu)' > "$runtime/libtorch/lib/libtorch.so"
echo 2.11.0 > "$runtime/libtorch/build-version"
