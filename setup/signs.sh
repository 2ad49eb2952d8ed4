#!/usr/bin/env bash
# Makes the embedded model again: pictures of words from the font, autoencoder and flow trained on
# them, reference tensors for the exporter, and how well it spells. OUT is the folder to fill.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/signs}
NG_TRAIN=${NG:-target/release}/ng-train
pictures=.runtime/signs
model=$OUT/model

fail() {
  echo "error: $*" >&2
  exit 1
}
[ -x "$NG_TRAIN" ] || fail "$NG_TRAIN is missing: run \`make build\`"
[ ! -e "$model" ] || fail "$model exists: remove it or set OUT to another folder"
mkdir -p "$OUT"

# ng-train puts the folder in place only when every picture is written.
if [ -f "$pictures/metadata.jsonl" ]; then
  echo "== pictures: $(wc -l < "$pictures/metadata.jsonl") in $pictures already"
else
  echo "== pictures into $pictures"
  "$NG_TRAIN" signs "$pictures"
fi
echo "== autoencoder and flow into $model"
"$NG_TRAIN" pretrain --preset signs --set output="$model" --set data="$pictures"
echo "== reference tensors"
"$NG_TRAIN" reference "$model"
echo "== spelling of held-out words: exact is read by PP-OCRv6, judge_exact by PP-OCRv4"
"$NG_TRAIN" eval --model "$model" --prompts assets/prompts/signs-held-out.txt --preset signs \
  --out "$OUT/eval"

cat << END

To ship it: rm -rf assets/signs && cp -r $model assets/signs
It should spell 20 to 60 % of the held-out words exactly, so that alignment has room.
END
