#!/usr/bin/env bash
# Everything that waits for a GPU, in parts of at most nine minutes each, most valuable first.
# usage: bash bench/gpu_session.sh OUT_DIR PART, a number or all: every part in order, whatever
#        becomes of the others
#        bash bench/gpu_session.sh --rehearse [PIECE...]: the same on a CPU, with contenders
#        that hang, crash and run out of time (bench/rehearsal.py)
#   1  the probe, tests, una_fast against the bare matrix products
#   2  the peers at every shape, then accuracy
#   3  tests of whole steps; training steps of Llama-3-8B against TRL: equal, ragged, shared prompts
#   4  forward variants, row kernels, slices; time and memory up to N = 131072; short responses
#   5  the steps of Qwen3-8B (equal), Qwen3-1.7B and gemma-3-1b; TRL's trainer with our head
#   6  the longest gemma-3-1b sequences of una_fast at 79 GiB
#   7  gemma-3-1b trained in full at 256k tokens, and at 79 GiB; TRL's longest sequences
#   8  Llama-3-8B with LoRA at 128k and 256k tokens    9  at 384k with 16 layers
# A folder peers/ of wheels (or .tar.xz of installed files) at the repository root is unpacked beside
# the machine's packages. OUT_DIR holds one JSON per result and logs.tar.gz, at most eight files a
# part. BENCH_COMMIT names the commit where the tree is a copy without git. Afterwards:
# python bench/tables.py --merge OUT_DIR/head_*.json, and the same for step_*.json
set -uo pipefail
usage='usage: gpu_session.sh OUT_DIR 1..9|all, or gpu_session.sh --rehearse [PIECE...]'
out=${1:?$usage}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(realpath -s "$PYTHON") ;; esac
export PYTHONUNBUFFERED=1

if [ "$out" = --rehearse ]; then
  shift
  exec "$PYTHON" bench/rehearsal.py "$@"
fi
part=${2:?$usage}
if [ "$part" = all ]; then
  failed=
  for part in 1 2 3 4 5 6 7 8 9; do
    echo "=== part $part"
    bash bench/gpu_session.sh "$out" "$part" || failed+=" $part"
  done
  echo "=== failed parts:${failed:- none}"
  [ -z "$failed" ]
  exit
fi
case $part in [1-9]) ;; *) echo "part $part is neither one of 1 to 9 nor all" && exit 2 ;; esac

# What a rehearsal replaces: the device, the scripts, the installation, and seconds by a tenth.
device=${BENCH_DEVICE:-cuda}
scripts=${BENCH_SCRIPTS:-bench}
install=${BENCH_INSTALL:-"$PYTHON -m pip install -q -e . --no-deps --no-build-isolation"}
whole=${BENCH_SECONDS:-540} # of a part; what is over is cut
mkdir -p "$out"
logs=$(mktemp -d)
status=0

pack() { # the logs of all parts as one file
  if [ -e "$out/logs.tar.gz" ]; then tar -C "$logs" -xzf "$out/logs.tar.gz" --skip-old-files; fi
  tar -C "$logs" -czf "$logs.tar.gz" . && mv "$logs.tar.gz" "$out/logs.tar.gz"
}
trap 'pack; rm -rf "$logs" "$out"/*.running "$out"/*.half' EXIT
trap 'exit 143' TERM INT

fail() { # REASON: the part ends here, its reason last
  echo "FAILED: part $part: $*" | tee "$logs/failed_$part.log"
  exit 3
}

limited() { # SECONDS LOG COMMAND...: no longer than that, nor than what is left of the part
  local seconds=$1 log=$logs/$2.log left=$((whole - SECONDS)) code
  shift 2
  [ "$seconds" -gt "$left" ] && seconds=$left
  if [ "$seconds" -lt 5 ]; then
    echo "not run, no time is left of part $part: $*" | tee -a "$log"
    status=1
    return 124
  fi
  if [ "${LINES_SHOWN:-all}" = all ]; then
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log"
  else
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log" | tail -n "$LINES_SHOWN"
  fi
  code=${PIPESTATUS[0]}
  [ "$code" -eq 124 ] || [ "$code" -eq 137 ] && echo "CUT after $seconds s: $*" | tee -a "$log"
  [ "$code" -eq 0 ] || status=1
  pack
  return "$code"
}

bench() { # NAME JSON SECONDS ARGUMENTS...: again without a contender under which a process ended
  local script=$scripts/bench_$1.py name=$2 end=$((SECONDS + $3)) code=75 left tries=0
  shift 3
  [ "$end" -gt "$whole" ] && end=$whole
  while [ $tries -lt 5 ] && [ $((end - SECONDS)) -gt 4 ]; do
    left=$((end - SECONDS))
    limited $left "$name" "$PYTHON" "$script" --device "$device" \
      --out "$out/$name.json" --resume --budget $((left * 9 / 10)) "$@"
    code=$?
    tries=$((tries + 1))
    # 75: it hung, or broke the GPU's context. 128 and more: a signal ended it. Not 137: cut.
    [ $code -eq 75 ] || { [ $code -ge 128 ] && [ $code -ne 137 ]; } || break
  done
  return $code
}

fresh() { # NAME...: results of this part alone; its own calls resume each other
  for name in "$@"; do rm -f "$out/$name".*; done
}

tests() { # SECONDS LOG ARGUMENTS...: in parallel; -P: the root off sys.path, where kernels/ would
  # hide the package of that name
  local workers=()
  "$PYTHON" -P -c 'import xdist' 2>>"$logs/$2.log" && workers=(-n "${BENCH_WORKERS:-4}")
  local seconds=$1 log=$2
  shift 2
  LINES_SHOWN=25 limited "$seconds" "$log" "$PYTHON" -P -m pytest "${workers[@]}" "$@"
}

# ---------------------------------------------------------------------------------- installation
$install >"$logs/install_$part.log" 2>&1 || fail "install: $(tail -n 3 "$logs/install_$part.log")"
if [ -d peers ] && [ "$device" = cuda ]; then
  export BENCH_PEERS=/tmp/peers_site
  mkdir -p "$BENCH_PEERS"
  for wheel in peers/*.whl; do # unpacked, not installed: several of them fill one package
    [ -e "$wheel" ] || continue
    "$PYTHON" -m zipfile -e "$wheel" "$BENCH_PEERS" || fail "install: cannot unpack $wheel"
  done
  for archive in peers/*.tar.xz; do
    [ -e "$archive" ] || continue
    tar -C "$BENCH_PEERS" -xf "$archive" || fail "install: cannot unpack $archive"
  done
fi
"$PYTHON" -P -c 'import una_fast, una_fast.kernels' >"$logs/import_$part.log" 2>&1 ||
  fail "install: $(tail -n 1 "$logs/import_$part.log")"
if [ "$device" = cuda ]; then
  # Where the driver has it, segments that grow: different buffers do not fragment the memory.
  segments=expandable_segments:True
  allocate='import torch; torch.empty(1 << 28, device="cuda")'
  if PYTORCH_ALLOC_CONF=$segments "$PYTHON" -c "$allocate" 2>"$logs/allocator.log"; then
    export PYTORCH_ALLOC_CONF=$segments
  else
    "$PYTHON" -c "$allocate" 2>>"$logs/allocator.log" ||
      fail "no GPU: $(tail -n 1 "$logs/allocator.log")"
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi

# ------------------------------------------------------------------------------------- the parts
last=
case $part in
1)
  fresh probe smoke head_bars
  limited 100 probe "$PYTHON" "$scripts/gpu_probe.py" --device "$device" ${BENCH_SMALL:-} \
    --out "$out/probe.json"
  # every kernel and dtype, one shape of the row kernels
  few="2049 or one_read or merge or infinity or stride or linear or loss or gather or segment or offsets"
  tests 120 tests ${BENCH_TESTS:-tests/test_gpu.py}
  tests 60 kernels ${BENCH_TESTS:-tests/test_kernels.py} -k "${BENCH_FEW:-$few}"
  bench head head_bars 200 --suite bars --seconds 6 --warmup 45
  # shared memory alone: the rest is the hundred repeats
  if command -v compute-sanitizer >"$logs/sanitizer.log"; then
    LINES_SHOWN=3 limited 30 sanitizer compute-sanitizer --tool racecheck --error-exitcode 9 \
      "$PYTHON" -P -m pytest tests/test_kernels.py -k "(test_row_kernels or test_one_read) and scaled and (2049 or 2048)"
  fi
  last=head_bars
  ;;
2)
  fresh head_peers
  # smoke: every contender once; a broken peer shows before the large shapes
  bench head head_peers 520 --suite smoke,peers,accuracy --seconds 8 --warmup 60
  last=head_peers
  ;;
3)
  fresh smoke_step step_llama
  # both loops once: a broken install shows before a model of 8B is built
  bench step smoke_step 60 --suite equal,ragged --models tiny-llama --rounds 1 --steps 1
  bench step step_llama 340 --suite equal,shared16,shared64,ragged --models llama3-8b --deadline 120
  tests 110 tests_steps ${BENCH_TESTS:-tests/test_gpu_steps.py}
  last=step_llama
  ;;
4)
  fresh head_long
  bench head head_long 105 --suite forward,slices --seconds 4
  bench head head_long 400 --suite memory,layouts --seconds 8 --warmup 60
  last=head_long
  ;;
5)
  fresh step_others
  bench step step_others 400 --suite equal,shared16,shared64,ragged --models gemma3-1b,qwen3-1.7b \
    --deadline 90
  bench step step_others 80 --suite equal --models qwen3-8b --deadline 90
  limited 50 embed "$PYTHON" "$scripts/bench_embed.py" --device "$device" \
    --cases tiny-long,tiny-short --out "$out/embed_gpu.json"
  last=step_others
  ;;
6) # lengths from the one TRL published: its doubles are the bars
  fresh step_longest
  bench step step_longest 520 --suite maxlen --models gemma3-1b --memory-cap 79 --offload \
    --start 59392 --contenders una_fast --mlp-tile 8192 --deadline 150
  last=step_longest
  ;;
7)
  fresh step_gemma
  bench step step_gemma 190 --suite long --models gemma3-1b --deadline 120
  bench step step_gemma 320 --suite maxlen --models gemma3-1b --memory-cap 79 --offload \
    --start 59392 --contenders trl --deadline 100
  last=step_gemma
  ;;
8)
  fresh step_long
  bench step step_long 525 --suite long --models llama3-8b --layers 32 --deadline 420
  last=step_long
  ;;
9)
  fresh step_long_16
  bench step step_long_16 525 --suite long --models llama3-8b --layers 16 --deadline 480
  last=step_long_16
  ;;
esac
echo
[ -e "$out/$last.json" ] && "$PYTHON" bench/tables.py --show "$out/$last.json"
echo "part $part: $SECONDS s, $([ $status -eq 0 ] && echo 'nothing failed' || echo 'see above')"
exit $status
