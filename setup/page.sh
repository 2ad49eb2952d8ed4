#!/usr/bin/env bash
# Uses the page of `ng-sample serve` in headless Chromium: $1 is the folder of `make runtime`, $2 that of
# the programs; pictures and votes go to $OUT. TUNED is the checkpoint that stands against the embedded
# model, by default a tiny one of random weights.
set -euo pipefail
cd "$(dirname "$0")/.."
runtime=$(cd "$1" && pwd)

. setup/debian.sh
need "chromium fonts-dejavu-core" command -v chromium
need chromium-driver command -v chromedriver
install_missing
if ! cmp -s setup/requirements-page.txt "$runtime/page/requirements.txt"; then
  rm -rf "$runtime/page.part" "$runtime/page"
  "$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
    --only-binary :all: --target "$runtime/page.part" --requirement setup/requirements-page.txt
  cp setup/requirements-page.txt "$runtime/page.part/requirements.txt"
  mv "$runtime/page.part" "$runtime/page"
fi

rm -rf "$OUT"
mkdir -p "$OUT"
"$2/ng-export" assets/signs --out "$OUT/base"
"$2/ng-export" "${TUNED:-tests/fixtures/tiny-schnell/pipeline}" --out "$OUT/tuned"
PYTHONPATH=$runtime/page "$runtime/venv/bin/python" -B tests/page/run.py --program "$2/ng-sample" \
  --models "base=$OUT/base" "tuned=$OUT/tuned" --out "$OUT"
