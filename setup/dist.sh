#!/usr/bin/env bash
# Packs the built programs into archives that run on a bare Debian 12 or newer, x86-64: $1 is the folder
# of the programs, $2 that of `make runtime`, $3 where the archives go.
#   ng-sample-VERSION-x86_64-linux.tar.xz   ng-sample, ng-export and ONNX Runtime
#   ng-train-VERSION-x86_64-linux.tar.xz    ng-train, libtorch for the CPU and ONNX Runtime
# Each has bin/, lib/, the licences, shell completions and man pages.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=$(cd "$1" && pwd)
runtime=$(cd "$2" && pwd)
mkdir -p "$3"
out=$(cd "$3" && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

. setup/debian.sh
need patchelf command -v patchelf
need xz-utils command -v xz
need binutils command -v strip
install_missing

packages=$(echo "$runtime"/venv/lib/python3*/site-packages)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

set_of() { # set_of NAME PROGRAM...: the folder of an archive, without libraries
  root=$work/$1-$version-x86_64-linux
  mkdir -p "$root/bin" "$root/lib" "$root/licences" "$root/completions" "$root/man/man1"
  local program name
  for program in "${@:2}"; do
    strip -o "$root/bin/$program" "$programs/$program"
    name=${program%-libtorch}
    [ "$name" = "$program" ] || continue
    "$programs/$name" --manual "$work/manual"
    mv "$work"/manual/*.1 "$root/man/man1/"
    mv "$work"/manual/* "$root/completions/"
  done
  cp LICENSE-APACHE LICENSE-MIT "$programs/THIRD-PARTY.txt" "$root/licences/"
  cp CHANGELOG.md "$root/"
  cp -L "$runtime/lib/libonnxruntime.so" "$root/lib/"
  cp "$packages"/onnxruntime/LICENSE "$root/licences/onnxruntime-LICENSE"
  cp "$packages"/onnxruntime/ThirdPartyNotices.txt "$root/licences/onnxruntime-ThirdPartyNotices.txt"
}

pack() { # pack: the folder as an archive, whole or not at all
  local name
  name=$(basename "$root")
  tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -c "$name" |
    xz -T0 -6 > "$out/$name.tar.xz.part"
  mv "$out/$name.tar.xz.part" "$out/$name.tar.xz"
  (cd "$out" && sha256sum "$name.tar.xz" > "$name.tar.xz.sha256")
  du -h --apparent-size "$out/$name.tar.xz"
}

set_of ng-sample ng-sample ng-export
cp docs/serve.md "$root/"
pack

set_of ng-train ng-train ng-train-libtorch
for library in libtorch_cpu.so libc10.so libgomp.so.1; do
  cp -L "$runtime/libtorch/lib/$library" "$root/lib/"
done
cp -L "$packages"/nvidia/cu13/lib/libcudart.so.13 "$packages"/nvidia/cu13/lib/libcupti.so.13 "$root/lib/"
# Nothing of this machine's folders stays in the files.
patchelf --set-rpath '$ORIGIN/../lib' "$root/bin/ng-train-libtorch"
patchelf --set-rpath '$ORIGIN' "$root/lib/libtorch_cpu.so"
cp "$packages"/torch-*.dist-info/licenses/LICENSE "$root/licences/torch-LICENSE"
cp "$packages"/torch-*.dist-info/licenses/NOTICE "$root/licences/torch-NOTICE"
find "$packages"/nvidia_cuda_{runtime,cupti}-*.dist-info -iname 'license*' -type f | while IFS= read -r file; do
  cp "$file" "$root/licences/$(basename "${file%%.dist-info*}")-LICENSE.txt"
done
pack
