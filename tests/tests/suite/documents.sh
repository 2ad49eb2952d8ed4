# What the commands of the documents mean in a test: the real programs, with a tiny model in place of
# FLUX.1-dev, one iteration in place of a run, and servers on loopback at a free port. $BIN has the programs,
# $ROOT is the repository; the working folder is a scratch with links to its assets.
set -euo pipefail
servers=()
trap 'for server in "${servers[@]}"; do kill "$server" 2> /dev/null || true; done' EXIT

small=(--set 'rewards=[{name = "jpeg", kind = "jpeg", prefer = "small", weight = 1.0}]' --set 'judges=[]'
  --set 'rollout.size=[32, 32]')

ng-train() {
  local command=$1 more=(--device cpu --threads 1)
  case " $* " in *" --preset neighbor "*) [ "$command" = plan ] || more+=("${small[@]}") ;; esac
  case $command in
    align) more+=(--set iterations=1 --set prompts_per_iteration=1) ;;
    eval) head -n 2 "$(after --prompts "$@")" > few.txt; more+=(--prompts few.txt) ;;
    bench) set -- bench --model FLUX.1-dev --size 32x32 --repeats 1 ;;
    compare)
      head -n 2 assets/prompts/signs-held-out.txt > few.txt
      more+=(--set minutes=0.001 --set prompts=few.txt --set 'seeds=[0]' --set 'tables=[{title = "T", runs = [{name = "R"}]}]')
      ;;
  esac
  if [ "$command" = eval ]; then without --prompts "$@"; set -- "${kept[@]}"; fi
  "$BIN/ng-train" "$@" "${more[@]}"
}
ng-export() {
  local out
  out=$(after --out "$@")
  [ ! -e "$out" ] || set -- "$@" --force
  "$BIN/ng-export" "$@"
}
ng-sample() {
  if [ "${1:-}" != serve ]; then
    "$BIN/ng-sample" "$@"
    return
  fi
  without --listen "$@"
  # The last server's address is not this one's.
  rm -f served
  "$BIN/ng-sample" "${kept[@]}" --listen 127.0.0.1:0 > served 2> served.log &
  servers+=($!)
  for _ in $(seq 600); do
    [ ! -s served ] || break
    kill -0 "${servers[-1]}" || { cat served.log >&2; return 1; }
    sleep 0.1
  done
  address=$(head -n 1 served)
}
curl() {
  local words=("${@//http:\/\/127.0.0.1:8080/$address}")
  python3 - "${words[@]//http:\/\/HOST:8080/$address}" << 'PYTHON'
import argparse, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d")
words = parser.parse_args()
headers = dict(header.split(": ", 1) for header in words.H)
request = urllib.request.Request(words.url, words.d and words.d.encode(), headers)
assert urllib.request.urlopen(request).status == 200
PYTHON
}
make() { grep -q "^$1:.* ## " "$ROOT/Makefile"; }
podman() { [ -f "$ROOT/Containerfile" ]; }
openssl() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

after() { # after FLAG WORD...: the word behind the flag, else nothing
  local flag=$1
  shift
  while [ $# -gt 1 ]; do
    if [ "$1" = "$flag" ]; then echo "$2"; return; fi
    shift
  done
}
without() { # without FLAG WORD...: all other words, in kept
  local flag=$1
  shift
  kept=()
  while [ $# -gt 0 ]; do
    if [ "$1" = "$flag" ]; then shift; else kept+=("$1"); fi
    shift
  done
}
