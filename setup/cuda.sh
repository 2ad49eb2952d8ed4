#!/usr/bin/env bash
# Adds to the folder $1, which light.sh has filled, the libraries with which the same programs compute on
# NVIDIA GPUs, and says whether this machine's driver is new enough. Safe to interrupt and to repeat.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runtime=$(cd "$1" && pwd)
DRIVER=580

exec 9> "$runtime/lock"
flock 9
"$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --only-binary :all: --requirement "$here/requirements-cuda.txt"

found=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1) || found=
if [ -z "$found" ]; then
  echo "installed; this machine has no NVIDIA driver (CUDA 13 needs $DRIVER or newer)"
elif [ "${found%%.*}" -lt "$DRIVER" ]; then
  echo "error: the NVIDIA driver is $found, and CUDA 13 needs $DRIVER or newer: install it, then reboot" >&2
  exit 1
else
  echo "installed; the NVIDIA driver is $found"
fi
