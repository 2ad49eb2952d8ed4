#!/usr/bin/env bash
# Adds the Python references of `make parity` (diffusers, transformers, the whole of torch) to the
# environment that light.sh made in the folder $1, checks that the shared parts stayed as they were,
# and puts Optimum and the packages that define rewards, with what they need, into folders beside it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runtime=$(cd "$1" && pwd)

exec 9> "$runtime/lock"
flock 9

"$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet \
  --only-binary :all: --requirement "$here/requirements-parity.txt"
while IFS= read -r line; do
  case $line in '#'* | ' '* | '') continue ;; esac
  line=${line%% *}
  found=$("$runtime/venv/bin/python" -c \
    'import sys, importlib.metadata as m; print(m.version(sys.argv[1]))' "${line%%==*}")
  [ "$found" = "${line##*==}" ] || {
    echo "error: requirements-parity.txt replaced $line by $found: make both files agree" >&2
    exit 1
  }
done < "$here/requirements-light.txt"

# Packages beside the environment: what each needs differs from what the others need.
for name in optimum rewards image-reward openai; do
  rm -rf "$runtime/$name" "$runtime/$name.part"
  "$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
    --only-binary :all: --target "$runtime/$name.part" \
    --requirement "$here/requirements-$name.txt"
  mv "$runtime/$name.part" "$runtime/$name"
done
