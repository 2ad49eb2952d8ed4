#!/usr/bin/env bash
# What only a GPU can show, in parts that each end within ten minutes:
#   signs      the embedded model aligned on the GPU in bf16, beside the same run on the CPU in f32
#   passes     velocity and training pass of FLUX.1-dev's size, against eager PyTorch
#   iteration  a whole Neighbor GRPO iteration of FLUX.1-dev's size, against eager PyTorch
# NG is the folder of the programs, PYTHON has torch, diffusers and peft, OUT is the folder to fill;
# DEVICE, MODEL and SIZES make the same parts run small on a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
NG=${NG:-target/release}
PYTHON=${PYTHON:-.runtime/venv/bin/python}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-flux.1-dev}
SIZES=${SIZES:-1024x1024 720x720}
ITERATIONS=${ITERATIONS:-150}
[ $# -gt 0 ] || set -- signs passes iteration
mkdir -p "$OUT"

sizes=()
for size in $SIZES; do sizes+=(--size "$size"); done
side=${SIZES##*x}
config=flow/src/known/$MODEL/transformer/config.json
[ -f "$config" ] || config=$MODEL/transformer/config.json

align_signs() { # align_signs NAME FLAG...
  local name=$1
  shift
  "$NG/ng-train" align "$@" --preset signs --set output="$OUT/signs-$name" \
    --set iterations="$ITERATIONS"
}
signs() {
  rm -rf "$OUT"/signs-*
  align_signs gpu --device "$DEVICE" --precision bf16
  align_signs cpu --device cpu
  "$NG/ng-train" eval --device cpu --preset signs --model assets/signs \
    --model "$OUT/signs-cpu/aligned" --model "$OUT/signs-gpu/aligned" \
    --prompts assets/prompts/signs-held-out.txt --out "$OUT/signs-eval"
}
passes() {
  "$NG/ng-train" bench --device "$DEVICE" --model "$MODEL" "${sizes[@]}"
  "$NG/ng-train" bench --device "$DEVICE" --model "$MODEL" "${sizes[@]}" --json > "$OUT/passes.json"
  "$PYTHON" benches/peers/flux_eager.py "$config" "$OUT/passes.json"
}
iteration() {
  local model=$OUT/random prompts=$OUT/prompts.txt
  rm -rf "$model" "$OUT/embeddings" "$OUT/iteration"
  "$NG/ng-train" init --like "$MODEL" --out "$model"
  printf '%s\n' 'a fox in the snow' > "$prompts"
  "$NG/ng-train" embed --device "$DEVICE" --model "$model" --prompts "$prompts" --out "$OUT/embeddings"
  "$NG/ng-train" align --device "$DEVICE" --preset neighbor --set model="$model" \
    --set output="$OUT/iteration" --set prompts="$prompts" --set sheet_prompts="$prompts" \
    --set embeddings="$OUT/embeddings" --set prompts_per_iteration=1 --set iterations=3 \
    --set "rollout.size=[$side,$side]" --set lora.rank=64 \
    --set 'rewards=[{name = "jpeg", kind = "jpeg", prefer = "small", weight = 1.0}]'
  tail -n 1 "$OUT/iteration/metrics.jsonl"
  "$NG/ng-train" bench --device "$DEVICE" --model "$MODEL" --size "${side}x$side" --json \
    > "$OUT/iteration-passes.json"
  "$PYTHON" benches/peers/flux_eager.py "$config" "$OUT/iteration-passes.json" \
    --metrics "$OUT/iteration/metrics.jsonl"
}

for part in "$@"; do
  case $part in
    signs | passes | iteration) ;;
    *) echo "error: no part $part: signs, passes and iteration are there" >&2; exit 2 ;;
  esac
  echo "== $part"
  start=$SECONDS
  "$part"
  echo "   $((SECONDS - start)) s"
done
