#!/bin/sh
# Fuzzes what is read from files, FUZZ seconds a target (all, or those named), on one thread each. What is new
# goes to fuzz/artifacts and, beside the corpus that is kept, to fuzz/target/corpus.
set -eu

cd "$(dirname "$0")/../fuzz"
# The sanitizers' flags are a nightly's; a stable compiler has them, too, where it is told to.
export RUSTC_BOOTSTRAP=1
cp ../Cargo.lock Cargo.lock
[ $# -gt 0 ] || set -- $(basename -s .rs -a fuzz_targets/*.rs)
for target; do
  mkdir -p "target/corpus/$target"
  cargo fuzz run "$target" "target/corpus/$target" "corpus/$target" -- \
    -max_total_time="${FUZZ:-600}" -rss_limit_mb=2048 -timeout=20 -print_final_stats=1
done
