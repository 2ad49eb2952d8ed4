#!/usr/bin/env bash
# The suites that compute, as on lesser processors: with AVX2 and no AVX-512, and with neither, each on one
# core and so with one thread, side by side where there are two. libtorch, MKL and oneDNN are limited by their
# variables; `host` by libtorch's. Vector widths of `host` need no limit: its bits are the same on each.
set -euo pipefail
cd "$(dirname "$0")/.."

suites() { # name of the run, core, then variables
  local name=$1 core=$2
  shift 2
  env "$@" taskset -c "$core" cargo test --release --locked --package host --package trainer --lib -q
  env "$@" taskset -c "$core" cargo test --release --locked --package tests -q -- \
    algorithms:: align:: compare:: determinism:: eval:: parity:: record:: score::
  echo "as on a processor of $name: all passed"
}

cores=$(nproc)
suites "2013 (AVX2)" 0 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 &
with_avx2=$!
[ "$cores" -gt 1 ] || wait "$with_avx2"
suites "2008 (SSE4.2)" $((cores - 1)) ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
  ONEDNN_MAX_CPU_ISA=SSE41 &
with_sse=$!
wait "$with_avx2"
wait "$with_sse"
