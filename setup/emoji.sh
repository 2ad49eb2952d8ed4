#!/usr/bin/env bash
# Makes assets/emoji and what belongs to it again: pictures and captions of 290 emoji in three art styles, a blank
# with tokenizers of its own, autoencoder and flow trained on them, another flow that was stopped early, reference
# tensors, two CLIPs that say whether a picture shows its caption, a sheet of held-out prompts. OUT is the folder to
# fill; what is there already is not made again. Arguments go to `ng-train pretrain`, as in --set
# autoencoder.image_passes=9600, or --resume after it was stopped. CLIP_PASSES says how many pictures each CLIP sees.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/emoji}
NG_TRAIN=${NG:-target/release}/ng-train
home=.runtime/emoji
clip=$OUT/clip
packages=(
  @iconify-json/noto@1.2.9
  @iconify-json/twemoji@1.2.5
  @iconify-json/fluent-emoji-flat@1.2.6
  emojibase-data@17.0.0
)

fail() {
  echo "error: $*" >&2
  exit 1
}
[ -x "$NG_TRAIN" ] || fail "$NG_TRAIN is missing: run \`make build\`"
python=.runtime/venv/bin/python
"$python" -c 'import transformers' 2> /dev/null || fail "no transformers: run \`make parity-runtime\`"
mkdir -p "$OUT" "$home/sources"

fetch() { # fetch NAME@VERSION: its archive, complete, into $home/sources
  local file=${1#@}
  file=${file//\//-}
  file=$home/sources/${file/@/-}.tgz
  [ ! -f "$file" ] || return 0
  command -v npm > /dev/null || fail "no npm on the path: install the Debian package npm, or node"
  rm -rf "$home/fetched"
  mkdir "$home/fetched"
  npm pack --silent --pack-destination "$home/fetched" "$1" > /dev/null || fail "npm cannot fetch $1"
  mv "$home/fetched/"*.tgz "$file"
}

echo "== pictures and blank into $home"
for package in "${packages[@]}"; do
  fetch "$package"
done
"$home/venv/bin/python" -m pip --version > /dev/null 2>&1 || python3 -m venv --clear "$home/venv"
"$home/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --only-binary :all: --requirement setup/requirements-emoji.txt
"$home/venv/bin/python" -B setup/emoji.py "$home/sources" assets/signs-blank setup/emoji-notice.md "$home"
pretrain() { # pretrain FOLDER ARGUMENT...
  local model=$1
  shift
  [ ! -e "$model" ] || return 0
  echo "== autoencoder and flow into $model"
  "$NG_TRAIN" pretrain --preset emoji --set output="$model" "$@"
  "$NG_TRAIN" reference "$model"
}
pretrain "$OUT/model" "$@"
pretrain "$OUT/early" --set flow.image_passes=128000 "$@"
for kind in reward judge; do
  [ ! -e "$clip/$kind" ] || continue
  echo "== CLIP, the $kind, into $clip/$kind"
  mkdir -p "$clip"
  "$python" -B setup/emoji_clip.py "$home/pictures" "$home/blank/tokenizer" "$clip/$kind" "$kind" \
    --threads "$(nproc)" ${CLIP_PASSES:+--passes "$CLIP_PASSES"}
done
echo "== held-out prompts: $OUT/eval/side-by-side.png"
"$NG_TRAIN" eval --model "$OUT/early" --model "$OUT/model" --prompts "$home/pictures/held-out.txt" --preset emoji \
  --set "rewards.0.weights=$clip/reward/model.safetensors" --set "rewards.0.tokenizer=$clip/reward" \
  --set "judges.0.weights=$clip/judge/model.safetensors" --set "judges.0.tokenizer=$clip/judge" \
  --out "$OUT/eval"

echo "NOTICE.md in $OUT/model and $OUT/early goes wherever they go."
