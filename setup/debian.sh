# Sourced by scripts that need Debian packages: `need PACKAGES TEST...` for each, then `install_missing`.
missing=()

need() { # need "PACKAGE..." TEST...: packages that the command TEST succeeds with
  "${@:2}" > /dev/null 2>&1 || missing+=($1)
}

install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  else
    echo "error: missing Debian packages: run \`apt-get install ${missing[*]}\` as root" >&2
    exit 1
  fi
}
