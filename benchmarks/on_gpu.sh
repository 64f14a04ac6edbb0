#!/usr/bin/env bash
# A GPU session in one call: builds the native library, runs the gpu-marked tests, compiles every kernel ahead of time, runs the
# benchmarks. A part that fails or runs out of time does not stop the next. Under $OUT: results.json with all that was measured,
# table.md, log.txt with what each part printed, and a folder for each part of `textok-fast bench`. Needs a Python with a CUDA
# torch of 2.11 or later; nothing is downloaded.
#
#   bash benchmarks/on_gpu.sh                                                everything, each part within its own limit
#   LIMIT=580 PARTS="build info report tests" bash benchmarks/on_gpu.sh      where a call may take no longer than LIMIT seconds
#   LIMIT=580 PARTS="build ops attention dit" bash benchmarks/on_gpu.sh
#   LIMIT=580 PARTS="build linear fp8 steps" bash benchmarks/on_gpu.sh
#   LIMIT=240 PARTS="build quick profile tests" bash benchmarks/on_gpu.sh    a first look, in four minutes
#   LIMIT=240 TESTS=few_rows PARTS="build few-rows tests" bash benchmarks/on_gpu.sh    a DiT block over few rows, Hopper and later
#   LIMIT=580 PARTS="build speedup" bash benchmarks/on_gpu.sh                whole systems: the reference form and the engine
#   LIMIT=580 PARTS="build compile" bash benchmarks/on_gpu.sh                the same with torch.compile beside them, fewer
#   LIMIT=580 PARTS="build fp8-speedup parity profile peers" bash benchmarks/on_gpu.sh
#   LIMIT=580 PARTS="build training" bash benchmarks/on_gpu.sh               training steps, images/s and share of the ceiling
#   LIMIT=580 STEPS=1000 PARTS="text-study" bash benchmarks/on_gpu.sh        48 tokenizers: what text is worth
#   PARTS="autotune" bash benchmarks/on_gpu.sh                               torch.compile max-autotune beside them, an hour
#
# Environment: OUT (default benchmarks/results/local), PYTHON, PARTS, LIMIT (seconds for the whole call), ROUNDS, SMOKE=1 (tiny
# shapes, to see that it runs), ARCHITECTURES (CMake's list for the CUDA part; default the present GPU's, "all" for the release's),
# WHEELS (a folder of wheels that the machine lacks, default .whl), SITE (one of unpacked packages, default .site), JOBS (processes
# for tests and compilation), TESTS (pytest's -k), BATCH and SYSTEMS (of `speedup`), STEPS and SEEDS (of `text-study`, of
# which text-study.tgz has the numbers and plots), COMMIT (of a tree without .git).
set -uo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONUNBUFFERED=1 TEXTOK_COMMIT=${COMMIT:-}
OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
[[ $PYTHON == */* ]] && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/${PYTHON##*/}
PARTS=${PARTS:-build info report tests ops attention linear fp8 dit steps speedup fp8-speedup compile parity profile peers training}
LIMIT=${LIMIT:-86400}
ROUNDS=${ROUNDS:-15}
WHEELS=${WHEELS:-.whl}
SITE=${SITE:-.site}
JOBS=${JOBS:-$(($(nproc) < 8 ? $(nproc) : 8))}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$OUT/log.txt"
ended=()
made=() # results that parts of this call write under $OUT

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
[ -d "$SITE" ] && export PYTHONPATH="$(cd "$SITE" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the tree itself: nothing has to be installed

has() { "$PYTHON" -c "import $1" 2>/dev/null; }
on_cuda() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((LIMIT - SECONDS - 25)) began=$SECONDS status how
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 5)); then
    how="not started: the time of this call is up"
  else
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
    case $status in
      0) how=ok ;;
      124 | 137) how="stopped after $limit s" ;;
      *) how="failed ($status)" ;;
    esac
    { printf '\n== %s: %s\n' "$name" "$how"; cat "$work/$name.log"; } >>"$OUT/log.txt"
    tail -n 12 "$work/$name.log" | cut -c -200
  fi
  echo "== $name: $how, $((SECONDS - began)) s"
  ended+=(--part "$name:$((SECONDS - began)):$how")
  merge # after each part: what was measured must be there even if the whole call is killed
}

merge() {
  local found=() file
  for file in "${made[@]}"; do [ -e "$file" ] && found+=("$file"); done
  "$PYTHON" benchmarks/summary.py "$work"/*.json "${found[@]}" --merge "$OUT/results.json" --commit "${COMMIT:-}" "${ended[@]}" \
    >"$OUT/table.md" 2>>"$OUT/log.txt"
}

# CMake by hand rather than pip: an unchanged source is not compiled again, and the present GPU's code is enough.
build() {
  local torch_dir architectures=${ARCHITECTURES:-} cuda=OFF options=()
  torch_dir=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') || return
  if command -v "${CUDACXX:-nvcc}" >/dev/null && on_cuda; then
    cuda=ON
    [ -n "$architectures" ] || architectures=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{chr(97) if (major, minor) == (9, 0) else str()}-real")')
  fi
  [ "$architectures" = all ] && architectures=
  command -v ninja >/dev/null && options=(-G Ninja)
  cmake -S . -B build/on-gpu "${options[@]}" -DCMAKE_BUILD_TYPE=Release "-DTEXTOK_TORCH_DIR=$torch_dir" \
    "-DTEXTOK_CUDA=$cuda" "-DTEXTOK_CUDA_ARCHITECTURES=$architectures" &&
    cmake --build build/on-gpu --parallel "$JOBS" &&
    cp build/on-gpu/libtextok_fast.so textok_fast/.libtextok_fast.new &&
    mv textok_fast/.libtextok_fast.new textok_fast/libtextok_fast.so &&
    "$PYTHON" -m textok_fast info
}
export -f build on_cuda
export PYTHON JOBS

benchmark() { # NAME SECONDS FILE EXPRESSION OPTIONS...
  local name=$1 limit=$2 file=$3 expression=$4
  shift 4
  part "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider "$file" -k "$expression" --rounds "$ROUNDS" \
    --benchmark-columns=median,iqr,rounds --benchmark-json "$work/$name.json" ${SMOKE:+--smoke} "$@"
}

steps() { # DTYPE SECONDS BUDGET OPTIONS...
  local dtype=$1 limit=$2 budget=$3
  shift 3
  part "steps-$dtype" "$limit" "$PYTHON" -m textok_fast bench steps --dtype "$dtype" --guidance --device "$device" \
    --time-budget "$budget" --out "$work/steps-$dtype.json" "$@"
}

speedup() { # NAME SECONDS OPTIONS... : the time budget leaves a part of the seconds for starting and for the ceilings
  local name=$1 limit=$2 left=$((LIMIT - SECONDS - 25)) small=()
  shift 2
  ((left < limit)) && limit=$left
  [ -n "${SMOKE:-}" ] && small=(--size tiny --systems TexTok-4 DiT/1 --forms reference engine --batch 1 --steps 4 --rounds 3)
  made+=("$OUT/$name/results.json")
  part "$name" "$limit" "$PYTHON" -m textok_fast bench speedup --device "$device" --out "$OUT/$name" \
    --time-budget "$((limit > 150 ? limit - 90 : 60))" "$@" "${small[@]}"
}

study() { # NAME SECONDS SETTINGS... : one of peers, parity, profile
  local name=$1 limit=$2
  shift 2
  made+=("$OUT/$name/$name.json")
  part "$name" "$limit" "$PYTHON" -m textok_fast bench "$name" --out "$OUT/$name" "device=$device" "$@"
}
device=$(on_cuda && echo cuda || echo cpu)
size=$([ -n "${SMOKE:-}" ] && echo tiny || echo XL)

for wanted in $PARTS; do
  case $wanted in
    build) part build 400 bash -c build ;;
    info) part info 60 "$PYTHON" -m textok_fast info ;;
    report) part report 300 "$PYTHON" -m textok_fast.ops.report --json "$work/report.json" --jobs "$JOBS" --cuda \
      --arch "$(on_cuda && echo present || echo sm_90)" ;;
    tests)
      part tests 500 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rf --durations 12 tests ${TESTS:+-k "$TESTS"} \
        $(has xdist && echo "-n $JOBS") $(has pytest_timeout && echo "--timeout 120")
      ;;
    ops) benchmark ops 500 benchmarks/test_ops.py "not attention and not linear" ;;
    attention) benchmark attention 300 benchmarks/test_ops.py short_attention ;;
    linear) benchmark linear 200 benchmarks/test_ops.py linear_gelu ;;
    fp8) benchmark fp8 400 benchmarks/test_ops.py fp8_linear ;;
    dit) benchmark dit 300 benchmarks/test_dit_step.py operations ;;
    autotune) benchmark autotune 7200 benchmarks/test_ops.py "not attention and not backward" --max-autotune ;;
    choices) # one file of its own: no table has its rows
      part choices 300 "$PYTHON" benchmarks/step_choices.py --size "$size" --device "$device" --out "$OUT/choices.json" \
        --batch ${BATCH:-1 8 64} --precision $([ "$device" = cuda ] && echo bf16 fp8 || echo bf16)
      ;;
    steps)
      if [ -n "${SMOKE:-}" ]; then
        steps fp32 60 5 --size tiny --tokens 32 64 --batch 1
      else
        steps bf16 420 240 --size XL --tokens 32 64 128 256 1024 4096 --batch 1 8 64
        steps fp32 300 150 --size XL --tokens 32 1024 4096 --batch 1 8
      fi
      ;;
    quick) speedup quick 150 --systems TexTok-32 DiT/1 --forms reference engine --dtype bf16 --batch 1 --no-compile-parts --full ;;
    speedup)
      speedup speedup 570 --forms reference engine --dtype bf16 --batch ${BATCH:-1 4 8 64 256} --no-compile-parts --full \
        ${SYSTEMS:+--systems $SYSTEMS}
      ;;
    compile) speedup compile 570 --systems TexTok-32 DiT/2 DiT/1 --dtype bf16 --batch 1 8 ;;
    fp8-speedup) speedup fp8-speedup 300 --forms engine --dtype "$([ "$device" = cuda ] && echo fp8 || echo int8)" ;;
    parity) study parity 240 "size=$size" ;;
    profile) study profile 120 "size=$size" precision=bf16 ;;
    training) # ViT-B tokenizer and DiT-XL steps: plain, fused, compiled, with recomputed blocks
      study training 400 "precisions=$([ "$device" = cuda ] && has torchao && echo '[bf16,fp8]' || echo '[bf16]')" \
        ${SMOKE:+tokenizer=tiny generator=tiny image_size=64 rounds=1} ;;
    text-study) # small networks, whose launches leave a GPU idle: as many trainings at once as there are cores
      part text-study 570 env -C "$work" "$PYTHON" -m textok_fast evaluate study --out text-study --jobs "$(nproc)" \
        ${SEEDS:+--seeds $SEEDS} ${SMOKE:+--tokens 2 4 --seeds 0 --pictures 16} "run.steps=${STEPS:-$([ -n "${SMOKE:-}" ] && echo 2 || echo 400)}"
      (cd "$work" && tar czf "$OUT/text-study.tgz" text-study/*.* text-study/*/study.json) # without the models
      ;;
    few-rows) part few-rows 120 "$PYTHON" benchmarks/few_rows.py --seconds 50 --out "$OUT/few_rows.json" ;;
    peers) # diffusers' DiT and the original form compute their modulation themselves, and diffusers' is over patches only
      study peers 400 "size=$size" "batch=[1]" "tokens=[32,1024]" "modulation=[inside]" \
        "precisions=$([ "$device" = cuda ] && echo '[fp32,bf16,fp8]' || echo '[fp32,bf16,int8]')" ;;
    *)
      ended+=(--part "$wanted:0:unknown part")
      merge
      ;;
  esac
done

printf '\n== %s\n' "$OUT"
cat "$OUT/table.md"
case " ${ended[*]} " in *:failed* | *:stopped* | *:"not started"* | *:unknown*) exit 1 ;; esac
