#!/usr/bin/env bash
# Makes .venv in the checkout: Python, torch (CPU or CUDA, whichever suits the machine), textok-fast with its development tools,
# and the native library where a compiler is found; in .venv/torchao what a test of FP8 needs. A second call sees that nothing
# has changed and returns at once.
#
# A torch that python3 already has is kept. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch>=2.11,<2.14"  # as in pyproject.toml
venv=.venv
stamp=$venv/.textok-fast-setup

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# What the environment was made from. The path is part of it, because a moved environment does not work.
fingerprint() {
  {
    pwd
    echo "${PYTHON:-}"
    cat pyproject.toml setup.py CMakeLists.txt scripts/setup.sh
    grep '^__version__' textok_fast/__init__.py
    find csrc -type f | LC_ALL=C sort | xargs cat
  } | cksum
}

python_ok() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }
torch_ok() {
  "$1" -c 'import re, sys, torch; sys.exit(not (2, 11) <= tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 14))' \
    >/dev/null 2>&1
}

make_venv() {
  local log
  if ! log=$("$1" -m venv --clear "${@:2}" "$venv" 2>&1); then
    rm -rf "$venv"
    die "python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv): $(tail -n 1 <<<"$log")"
  fi
}

wanted=$(fingerprint)
if [ -f "$stamp" ] && [ "$(tail -n 1 "$stamp")" = "$wanted" ] && [ -x "$venv/bin/textok-fast" ]; then
  exit 0
fi

# -- the virtual environment ------------------------------------------------------------------------------------------
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$PWD" ]; then
  say "the checkout has moved: making $venv anew"
  rm -rf "$venv"
fi
if ! { [ -x "$venv/bin/python" ] && python_ok "$venv/bin/python"; }; then
  if [ -e "$venv" ] && [ ! -f "$stamp" ]; then
    die "$venv is there, was not made by this script and has no Python 3.11 or 3.12: move it away"
  fi
  python=
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if python_ok "$candidate"; then python=$candidate; break; fi
  done
  if [ -n "$python" ]; then
    say "making $venv with $("$python" --version)"
    if torch_ok "$python"; then
      make_venv "$python" --system-site-packages
      torch_ok "$venv/bin/python" || make_venv "$python"  # that torch lies in a virtual environment, which ours cannot see
    else
      make_venv "$python"
    fi
  elif [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; then
    say "no Python 3.11 or 3.12 here: uv makes $venv"
    uv venv --quiet --seed --python 3.12 "$venv"
  else
    die "Python 3.11 or 3.12 is needed, found ${PYTHON:-$(python3 --version 2>/dev/null || echo no python3)}; PYTHON=/path/to/python3.12 chooses another"
  fi
fi
python=$venv/bin/python
printf '%s\n' "$PWD" >"$stamp"

# -- installers: uv is several times faster; pip does what uv cannot ----------------------------------------------------
export PIP_DISABLE_PIP_VERSION_CHECK=1
quiet=(--quiet)
if [ -t 2 ]; then quiet=(); fi  # show progress to a person

find_links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}}
find_links=$(tr -s ' \n' ',' <<<"$find_links" | sed 's/^,//; s/,$//')  # pip parts them by spaces, uv by commas
local_torch=
for directory in ${find_links//,/ }; do
  if compgen -G "${directory#file://}/torch-2.*.whl" >/dev/null; then local_torch=yes; fi
done
if [ -n "$find_links" ]; then export UV_FIND_LINKS=$find_links; fi

use_uv=
if grep -qi 'include-system-site-packages = true' "$venv/pyvenv.cfg"; then
  say "keeping this machine's torch"  # pip sees the packages outside the environment, uv does not
elif "$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv; then
  use_uv=yes
else
  say "uv cannot be had, pip is slower"
fi
install() {
  if [ -n "$use_uv" ]; then
    "$python" -m uv pip install ${quiet[@]+"${quiet[@]}"} --python "$python" "$@"
  else
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} "$@"
  fi
}

# -- torch first, so that nothing after it chooses another build ---------------------------------------------------------
if ! torch_ok "$python"; then
  say "installing $TORCH"
  if [ -n "$use_uv" ] && [ -z "$local_torch" ]; then
    # auto: the build for this machine's GPU driver, or the CPU build, from PyTorch's own index.
    install --torch-backend=auto "$TORCH" || { say "PyTorch's index does not answer: taking the default build"; install "$TORCH"; }
  else
    install "$TORCH"
  fi
fi

# -- textok-fast -----------------------------------------------------------------------------------------------------------
build_tools=("setuptools>=77" wheel)
if command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null; then
  command -v cmake >/dev/null || build_tools+=(cmake)
  command -v ninja >/dev/null || command -v make >/dev/null || build_tools+=(ninja)
fi
say "installing textok-fast and its development tools"
install "${build_tools[@]}"
install --no-build-isolation -e ".[dev]"

# transformers imports a torchao that it finds, which warns on stderr in every command: so it lies where only its test looks.
torchao=$(sed -n 's/^fp8 = \["\(.*\)"\]$/\1/p' pyproject.toml)
install --no-deps --upgrade --target "$venv/torchao" "$torchao" || say "torchao cannot be had: its test will be skipped"

say "native library: $("$python" -c 'from textok_fast import _native; print(_native.load().reason)')"
printf '%s\n' "$wanted" >>"$stamp"
