#!/usr/bin/env bash
# A whole GPU session in one call: installs from the tree, runs the gpu-marked tests, then every benchmark; one JSON and one log
# for each part under $OUT (default: benchmarks/results/local). A part that fails does not stop the next; the last lines say how
# each one ended. Needs a Python with a CUDA torch of 2.11 or later; nothing is downloaded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
summary=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  tail -n 15 "$OUT/$name.log"
  summary+=("$(printf '%-20s %s' "$name" "$([ $status -eq 0 ] && echo ok || echo "failed ($status), see $name.log")")")
}

# No dependencies: what the machine lacks is reported by the parts that need it.
part install 300 "$PYTHON" -m pip install --no-build-isolation --no-deps --quiet --editable .
part info 60 "$PYTHON" -m textok_fast info
part tests 300 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
part speedup-bf16 420 "$PYTHON" -m textok_fast bench speedup --size XL --tokens 32 64 128 256 1024 4096 --batch 1 8 64 \
  --dtype bf16 --guidance --device cuda --time-budget 300 --out "$OUT/speedup-bf16.json"
part speedup-fp32 300 "$PYTHON" -m textok_fast bench speedup --size XL --tokens 32 1024 4096 --batch 1 8 \
  --dtype fp32 --guidance --device cuda --time-budget 180 --out "$OUT/speedup-fp32.json"

printf '\n== summary (%s)\n' "$OUT"
printf '%s\n' "${summary[@]}"
