#!/usr/bin/env bash
# Makes a second model, open vocabulary in three art styles: pictures and captions of 1,256 emoji, a blank
# with tokenizers of its own, autoencoder and flow trained on them, reference tensors, a sheet of held-out
# prompts. OUT is the folder to fill; arguments go to `ng-train pretrain`, as in --set flow.image_passes=9600.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/emoji}
NG_TRAIN=${NG:-target/release}/ng-train
home=.runtime/emoji
model=$OUT/model
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
[ ! -e "$model" ] || fail "$model exists: remove it or set OUT to another folder"
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
echo "== autoencoder and flow into $model"
"$NG_TRAIN" pretrain --preset emoji --set output="$model" "$@"
echo "== reference tensors"
"$NG_TRAIN" reference "$model"
echo "== held-out prompts: $OUT/eval/side-by-side.png"
"$NG_TRAIN" eval --model "$model" --prompts "$home/pictures/held-out.txt" --preset emoji \
  --set rewards=[] --set 'judges=[{ name = "kB", kind = "jpeg", prefer = "large", weight = 0 }]' \
  --out "$OUT/eval"

cat << END

$model has $(du -sb "$model" | cut -f 1) bytes; NOTICE.md in it goes wherever it goes.
To align it with a CLIP score: ng-train align --preset emoji --set rewards.0.weights=…
END
