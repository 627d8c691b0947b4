# Sourced by scripts/demo and scripts/test: a virtual environment in .venv with the project and its extras.
# Safe to run again: nothing is installed while pyproject.toml and constraints.txt stay as they are.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "expected Python 3.11 or newer (ONNX Runtime and transformers need it), found $(python3 --version 2>&1); install it, or set PYTHON to its path"
}

# use_environment EXTRAS: creates .venv if needed and installs ".[EXTRAS]" with the tested versions.
use_environment() {
  local extras=$1 python want have
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 1
    "$python" -m venv .venv ||
      fail "cannot create .venv with $python; on Debian or Ubuntu run: sudo apt install python3-venv, then again"
  fi
  want="$extras $(cat pyproject.toml constraints.txt | cksum)"
  have=$(cat ".venv/installed-$extras" 2>/dev/null || true)
  if [ "$want" != "$have" ]; then
    echo "installing flashvlm[$extras] into .venv (a few minutes the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" ||
      fail "the packages did not install; check the network and disk space, then run this again (rm -rf .venv starts over)"
    printf '%s\n' "$want" >".venv/installed-$extras"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}
