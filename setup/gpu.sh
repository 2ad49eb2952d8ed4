#!/usr/bin/env bash
# What only a GPU can show, in parts meant for less than four minutes each (LIMIT ends one after so many seconds); a table
# at the end, which fails where a target is missed, everything as JSON in OUT. `make gpu-kit` packs it with all it needs
# for a machine without network.
#   signs           the embedded model aligned on the GPU in bf16, beside the same run on the CPU in f32
#   passes          velocity and training pass of FLUX.1-dev's size, against eager and compiled PyTorch
#   iteration       a Neighbor GRPO group of FLUX.1-dev's size with a LoRA, against eager PyTorch
#   iteration-1024  the same at 1024x1024
#   whole           a group where all weights train, as deep as memory allows (BLOCKS)
#   nccl            every collective and an abort through NCCL; two ranks on one GPU, which must be refused
#   determinism     the same seed twice; |log ratio| before the first update at several batch sizes
#   export          a real-width double and single block through ONNX Runtime: both forms of attention and what
#                   computes them, with cuDNN's kernels and without; LoRA slots of rank 0 and 1
#   sample          ng-sample at full depth, 1024x1024, 8 steps
# PYTHON has torch, transformers and peft. DEVICE, PROVIDER, MODEL, SIZE, LARGE, BLOCKS, DEPTH, ITERATIONS, PRECISION, COMPILE make
# the same parts run small on a machine without a GPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PARTS=(signs passes iteration iteration-1024 whole nccl determinism export sample)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-flux.1-dev}
SIZE=${SIZE:-720}
LARGE=${LARGE:-1024}
BLOCKS=${BLOCKS:-6,12}
ITERATIONS=${ITERATIONS:-100}
PRECISION=${PRECISION:-bf16}
PROVIDER=${PROVIDER:-$([ "$DEVICE" = cuda ] && echo cuda || echo cpu)}
COMPILE=${COMPILE:-yes}
REPEATS=${REPEATS:-2}
LIMIT=${LIMIT:-590}
OUT=${OUT:-$here/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

root=$here/unpacked
unpack() { # unpack ARCHIVE FOLDER: once; the archive may go then
  [ -f "$here/$1.tar.xz" ] && [ ! -f "$2/.whole" ] || return 0
  mkdir -p "$2"
  "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    "$here/$1.tar.xz" "$2"
  for wheel in "$2"/wheels/*.whl; do
    [ ! -f "$wheel" ] || "$PYTHON" -m zipfile -e "$wheel" "$root/site"
  done
  touch "$2/.whole"
}
unpack kit "$root"
unpack cuda "$root/cuda"
cd "$root" || { echo "error: no $here/kit.tar.xz: \`make gpu-kit\` makes it" >&2; exit 1; }
[ ! -d cuda ] || export ORT_DYLIB_PATH=$root/cuda/libonnxruntime.so
NG=$root/bin
# libtorch is Python's own, which must be the one that the programs were built for; so are CUDA's libraries.
libraries=$("$PYTHON" - << 'END'
import pathlib, sys, torch
if not torch.__version__.startswith("2.11."):
    sys.exit(f"error: torch is {torch.__version__}: the programs need 2.11")
packages = pathlib.Path(torch.__file__).parents[1]
print(*[packages / "torch/lib", *sorted(packages.glob("nvidia/*/lib"))], sep=":")
END
)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$root/site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

# weightless NAME [DOUBLE,SINGLE [T5]]: a folder of MODEL without weights, with as many blocks
weightless() {
  [ -d "$OUT/models/$1" ] && return
  mkdir -p "$OUT/models"
  "$NG/ng-train" init --like "$MODEL" --zero --out "$OUT/models/$1" > /dev/null
  find "$OUT/models/$1" \( -name '*.safetensors*' -o -name SHA256SUMS \) -delete
  "$PYTHON" peers/blocks.py "$OUT/models/$1" "${@:2}"
}
compile=()
[ "$COMPILE" = no ] || compile=(--compile)
JPEG='rewards=[{name="jpeg",kind="jpeg",prefer="small",weight=1.0,std_floor=1e-9}]'

align_signs() { # align_signs NAME FLAG...
  local name=$1
  shift
  rm -rf "$OUT/signs-$name"
  # Rollout and update in batches of one size, which kernels round alike.
  "$NG/ng-train" align "$@" --quiet --preset signs --set 'judges=[]' --set rollout.batch=16 \
    --set output="$OUT/signs-$name" > /dev/null
}
part_signs() {
  align_signs cpu --device cpu --set iterations="$ITERATIONS" --set minutes=2.5 &
  local on_cpu=$!
  align_signs gpu --device "$DEVICE" --precision "$PRECISION" --set iterations="$ITERATIONS" \
    --set minutes=2.5
  wait "$on_cpu"
  "$PYTHON" peers/curves.py signs "$OUT/signs-cpu/metrics.jsonl" "$OUT/signs-gpu/metrics.jsonl"
}
part_passes() {
  local passes=$OUT/passes-ours.json
  weightless model
  "$NG/ng-train" bench --device "$DEVICE" --precision "$PRECISION" --model "$OUT/models/model" \
    --size "${LARGE}x$LARGE" --size "${SIZE}x$SIZE" --json > "$passes"
  "$PYTHON" peers/flux_eager.py "$OUT/models/model/transformer/config.json" "$passes" \
    "${compile[@]}" --json
}
iteration() { # iteration MODEL SIDE [SETTING...]
  local model=$1 side=$2 whole=()
  shift 2
  local settings=(--set prompts_per_iteration=1 --set "rollout.size=[$side,$side]" --set "$JPEG")
  for setting in "$@"; do settings+=(--set "$setting"); done
  [ $# -gt 0 ] || whole=(--whole)
  "$NG/ng-train" bench --device "$DEVICE" --precision "$PRECISION" --model "$OUT/models/$model" \
    --iteration neighbor "${settings[@]}" --repeats "$REPEATS" --json > "$OUT/$part-ours.json"
  "$PYTHON" peers/flux_eager.py "$OUT/models/$model/transformer/config.json" --iteration \
    "$OUT/$part-ours.json" "${whole[@]}" --json
}
part_iteration() { weightless model && iteration model "$SIZE" lora.rank=64; }
part_iteration-1024() { weightless model && iteration model "$LARGE" lora.rank=64; }
# Sixteen bytes a weight that trains, alone in its world: 6 and 12 blocks of FLUX.1-dev's are 57 of an H100's 80 GB.
part_whole() { weightless shallow "$BLOCKS" 1 && iteration shallow "$SIZE"; }

rank() { # rank RANK WORLD CASE: a process of a world on this machine
  RANK=$1 WORLD_SIZE=$2 LOCAL_RANK=$1 LOCAL_WORLD_SIZE=$2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 \
    DEVICE=$DEVICE STEP=20 JOIN=20 "$NG/cluster-rank" "$3" 2>&1
}
part_nccl() {
  rank 0 1 collectives > "$OUT/nccl-collectives.txt" || true
  rank 0 1 bandwidth > "$OUT/nccl-bandwidth.txt" || true
  rank 0 1 abort > "$OUT/nccl-abort.txt" || true
  rank 1 2 collectives > "$OUT/nccl-two-b.txt" & local other=$!
  rank 0 2 collectives > "$OUT/nccl-two-a.txt" || true
  wait "$other" || true
  "$PYTHON" peers/curves.py nccl "$OUT"
}
part_determinism() {
  for name in once again; do
    align_signs "$name" --device "$DEVICE" --precision "$PRECISION" --set iterations=5 --set seed=3
  done
  for batch in 96 16 1; do
    "$NG/ng-train" bench --device "$DEVICE" --precision "$PRECISION" --model assets/signs --iteration signs \
      --set prompts_per_iteration=2 --set "rollout.batch=$batch" --set "$JPEG" --set 'judges=[]' \
      --repeats 1 --json > "$OUT/determinism-$batch.json" 2> "$OUT/determinism-$batch.txt" || true
  done
  "$PYTHON" peers/curves.py determinism "$OUT" 96 16 1
}
exported() { # exported NAME TARGET FLAG...: models/NAME as models/exported
  rm -rf "$OUT/models/exported"
  "$NG/ng-export" "$OUT/models/$1" --out "$OUT/models/exported" --target "$2" "${@:3}" > /dev/null
}
on_provider() { # on_provider COMMAND FLAG...: of ng-sample on models/exported, LARGE pixels
  "$NG/ng-sample" "$1" --model "$OUT/models/exported" --provider "$PROVIDER" --width "$LARGE" \
    --height "$LARGE" --max-sequence-length 512 --json "${@:2}"
}
measured() { on_provider bench --images "$REPEATS" --starts 1; }
random() { # random NAME BLOCKS: models/NAME with weights on disk
  [ -d "$OUT/models/$1" ] && return
  weightless "$1-like" "$2" 1
  "$NG/ng-train" init --like "$OUT/models/$1-like" --out "$OUT/models/$1" > /dev/null
}
precision() { [ "$PROVIDER" = cuda ] && echo bf16 || echo f32; }
part_export() {
  random blocks 1,1
  for form in multi-head standard; do
    exported blocks "$PROVIDER" --precision "$(precision)" --attention $form
    measured > "$OUT/export-$form.json"
    ORT_ENABLE_CUDNN_FLASH_ATTENTION=0 measured > "$OUT/export-$form-without-cudnn.json"
    ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO=1 on_provider generate --prompt a --steps 1 \
      -o "$OUT/export.png" > "$OUT/export-$form.kernels"
  done
  # The targets differ in f16 in nothing but the rank of an empty slot.
  for slots in none:cuda 0:cpu 1:cuda; do
    local rank=${slots%:*} flags=(--precision f16 --attention multi-head)
    [ "$rank" = none ] || flags+=(--lora-slots)
    exported blocks "${slots#*:}" "${flags[@]}"
    measured > "$OUT/export-slots-$rank.json"
    on_provider generate --prompt a --steps 2 -o "$OUT/export.png" \
      --latents-out "$OUT/export-slots-$rank.safetensors" > /dev/null
  done
  peer_of blocks
  "$PYTHON" peers/curves.py export "$OUT"
}
part_sample() {
  random model-on-disk "${DEPTH:-}"
  exported model-on-disk "$PROVIDER" --precision "$(precision)"
  measured > "$OUT/sample-ours.json"
  peer_of model-on-disk "${compile[@]}"
  "$PYTHON" peers/curves.py sample "$OUT"
}
peer_of() { # peer_of NAME FLAG...: libtorch's and PyTorch's passes of the same network
  local config=$OUT/models/$1/transformer/config.json
  "$NG/ng-train" bench --device "$DEVICE" --precision "$PRECISION" --model "$OUT/models/$1-like" \
    --size "${LARGE}x$LARGE" --json > "$OUT/$part-passes.json"
  "$PYTHON" peers/flux_eager.py "$config" "$OUT/$part-passes.json" "${@:2}" --json > "$OUT/$part-peer.json"
}

if [ "${1:-}" = --part ]; then
  part=$2
  "part_$part"
  exit
fi
[ $# -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
  case " ${PARTS[*]} " in
    *" $part "*) ;;
    *) echo "error: no part $part: ${PARTS[*]} are there" >&2; exit 2 ;;
  esac
done
for part in "$@"; do
  start=$SECONDS code=0
  echo "== $part"
  timeout "$LIMIT" "$BASH" "$here/gpu.sh" --part "$part" > "$OUT/$part.out" 2> "$OUT/$part.err" || code=$?
  tail -n 3 "$OUT/$part.err"
  echo "{\"part\": \"$part\", \"code\": $code, \"seconds\": $((SECONDS - start))}" > "$OUT/$part.end"
done
"$PYTHON" peers/table.py "$OUT" "$DEVICE" "$@"
