#!/usr/bin/env bash
# The whole path in one go: align the embedded model, compare before and after on held-out words,
# export to ONNX, sample without libtorch, and a table of what came out. OUT is the folder to fill
# (an earlier demo there is removed), BASE the model to start from.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/demo}
NG=${NG:-target/release}
base=${BASE:-assets/signs}
held_out=assets/prompts/signs-held-out.txt
marker=$OUT/.made-by-make-demo

fail() {
  echo "error: $*" >&2
  exit 1
}
for program in ng-train ng-export ng-sample; do
  [ -x "$NG/$program" ] || fail "$NG/$program is missing: run \`make build\`"
done
[ -f "$base/model_index.json" ] || fail "no model in $base: \`make signs\` makes it"
if [ -e "$OUT" ]; then
  [ -f "$marker" ] || fail "$OUT exists and no demo made it: remove it or set OUT to another folder"
  rm -rf "$OUT"
fi
mkdir -p "$OUT"
touch "$marker"

stage() { # stage TITLE COMMAND...
  local title=$1 start=$SECONDS
  shift
  echo "== $title"
  "$@" || fail "this step failed: $title"
  echo "   $((SECONDS - start)) s"
}
export_onnx() {
  "$NG/ng-export" "$OUT/aligned" --out "$OUT/export" --verify | tee "$OUT/export.txt"
}
sample_held_out() {
  "$NG/ng-sample" --model "$OUT/export" --prompts "$held_out" --threads 1 --json \
    -o "$OUT/held-out" --sheet "$OUT/held-out.png" > "$OUT/sample.jsonl"
}

stage "align: Neighbor GRPO, rewarded by what PP-OCRv6 reads" \
  "$NG/ng-train" align --preset signs --set model="$base" --set output="$OUT"
stage "compare on words neither training has seen" \
  "$NG/ng-train" eval --preset signs --model "$base" --model "$OUT/aligned" \
  --prompts "$held_out" --out "$OUT/eval"
cp "$OUT/eval/side-by-side.png" "$OUT/before-after.png"
stage "export to ONNX and run every graph against libtorch's tensors" export_onnx
stage "sample one word with ONNX Runtime" \
  "$NG/ng-sample" --model "$OUT/export" --prompt 'red "CAT"' --steps 8 --seed 7 \
  --threads 1 -o "$OUT/cat.png"
stage "sample every held-out word, one thread" sample_held_out

python3 setup/demo_table.py "$OUT"
