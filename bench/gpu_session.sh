#!/usr/bin/env bash
# Everything that waits for a GPU, in parts of at most ten minutes each; results as JSON, a short table last.
# usage: bash bench/gpu_session.sh OUT_DIR PART, a number or all: every part in order, whatever becomes of the others
#   1  tests, smoke of every contender, una_fast against the bare matrix products
#   2  the peers at every shape, then accuracy
#   3  forward variants, row kernels and vocabulary slices; time and memory up to N = 131072; many short responses
#   4  tests of whole steps: memory against its plan, offloads; training steps of Llama-3-8B against TRL: equal, ragged and shared prompts
#   5  the same of Qwen3-8B (equal), Qwen3-1.7B and gemma-3-1b
#   6  the longest gemma-3-1b sequences of una_fast at 79 GiB
#   7  gemma-3-1b trained in full at 256k tokens, and at 79 GiB; TRL's longest sequences
#   8  Llama-3-8B with LoRA at 128k and 256k tokens    9  at 384k with 16 layers
# A folder peers/ of wheels (or .tar.xz of installed files) at the repository root is unpacked beside the machine's
# packages. Afterwards: python bench/tables.py --merge OUT_DIR/head_*.json, and the same for step_*.json
set -uo pipefail
out=${1:?usage: gpu_session.sh OUT_DIR 1..9|all}
part=${2:?usage: gpu_session.sh OUT_DIR 1..9|all}
if [ "$part" = all ]; then
  failed=
  for part in 1 2 3 4 5 6 7 8 9; do
    echo "=== part $part"
    bash "$0" "$out" "$part" || failed+=" $part"
  done
  echo "=== failed parts:${failed:- none}"
  [ -z "$failed" ]
  exit
fi
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONUNBUFFERED=1

python3 -m pip install -q -e . --no-deps --no-build-isolation
if [ -d peers ]; then
  export BENCH_PEERS=/tmp/peers_site
  mkdir -p "$BENCH_PEERS"
  for wheel in peers/*.whl; do # unpacked, not installed: several of them fill one package
    [ -e "$wheel" ] && python3 -m zipfile -e "$wheel" "$BENCH_PEERS"
  done
  for archive in peers/*.tar.xz; do
    [ -e "$archive" ] && tar -C "$BENCH_PEERS" -xf "$archive"
  done
fi
# Where the driver has it, segments that grow: the contenders' different buffers then do not fragment the memory.
segments=expandable_segments:True
if PYTORCH_ALLOC_CONF=$segments python3 -c 'import torch; torch.empty(1 << 28, device="cuda")' 2>"$out/allocator.log"; then
  export PYTORCH_ALLOC_CONF=$segments
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

bench() { # bench_NAME JSON SECONDS ARGUMENTS...: again without a contender that broke the GPU's context (status 75)
  local script=bench/bench_$1.py json=$2 end=$((SECONDS + $3)) status=75
  shift 3
  while [ $status -eq 75 ] && [ $((end - SECONDS)) -gt 20 ]; do
    local left=$((end - SECONDS))
    timeout -k 5 $left python3 "$script" --device cuda --out "$json" --resume --budget $((left - 50)) "$@"
    status=$?
  done 2>&1 | tee -a "${json%.json}.log"
}

fresh() { # NAME...: results of this part alone: those of other parts stay, and its own calls resume each other
  for name in "$@"; do rm -f "$out/$name.json" "$out/$name.log"; done
}

case $part in
1)
  fresh smoke head_bars
  # -P: the repository root off sys.path, where kernels/ would hide the package of that name
  timeout -k 5 150 python3 -P -m pytest tests/test_gpu.py -q 2>&1 | tee "$out/tests.log" | tail -25
  # every kernel and dtype, one shape of the row kernels
  few="2049 or merge or infinity or stride or linear or loss or gather or segment or offsets"
  timeout -k 5 100 python3 -P -m pytest tests/test_kernels.py -q -k "$few" 2>&1 | tee "$out/kernels.log" | tail -12
  if command -v compute-sanitizer >"$out/sanitizer.log"; then # shared memory alone: the rest is the hundred repeats
    timeout -k 5 30 compute-sanitizer --tool racecheck --error-exitcode 9 \
      python3 -P -m pytest tests/test_kernels.py -q -k "test_row_kernels and 2049 and scaled" >>"$out/sanitizer.log" 2>&1
    echo "racecheck: exit status $?"
  else
    echo "racecheck: not run, there is no compute-sanitizer"
  fi
  bench head "$out/smoke.json" 80 --suite smoke --warmup 45
  bench head "$out/head_bars.json" 190 --suite bars --seconds 8
  last=head_bars
  ;;
2)
  fresh head_peers
  bench head "$out/head_peers.json" 525 --suite peers,accuracy --seconds 8 --warmup 60
  last=head_peers
  ;;
3)
  fresh head_long
  bench head "$out/head_long.json" 105 --suite forward,slices --seconds 4
  bench head "$out/head_long.json" 420 --suite memory,layouts --seconds 8 --warmup 60
  last=head_long
  ;;
4)
  fresh smoke_step step_llama
  timeout -k 5 110 python3 -P -m pytest tests/test_gpu_steps.py -q 2>&1 | tee "$out/tests_steps.log" | tail -15
  # both loops once: a broken install shows before a model of 8B is built
  bench step "$out/smoke_step.json" 80 --suite equal,ragged --models tiny-llama --rounds 1 --steps 1
  bench step "$out/step_llama.json" 340 --suite equal,shared16,shared64,ragged --models llama3-8b --deadline 120
  last=step_llama
  ;;
5)
  fresh step_others
  bench step "$out/step_others.json" 420 --suite equal,shared16,shared64,ragged --models gemma3-1b,qwen3-1.7b \
    --deadline 90
  bench step "$out/step_others.json" 110 --suite equal --models qwen3-8b --deadline 90
  last=step_others
  ;;
6) # lengths from the one TRL published: its doubles are the bars
  fresh step_longest
  bench step "$out/step_longest.json" 530 --suite maxlen --models gemma3-1b --memory-cap 79 --offload \
    --start 59392 --contenders una_fast --mlp-tile 8192 --deadline 150
  last=step_longest
  ;;
7)
  fresh step_gemma
  bench step "$out/step_gemma.json" 190 --suite long --models gemma3-1b --deadline 120
  bench step "$out/step_gemma.json" 340 --suite maxlen --models gemma3-1b --memory-cap 79 --offload \
    --start 59392 --contenders trl --deadline 100
  last=step_gemma
  ;;
8)
  fresh step_long
  bench step "$out/step_long.json" 535 --suite long --models llama3-8b --layers 32 --deadline 420
  last=step_long
  ;;
9)
  fresh step_long_16
  bench step "$out/step_long_16.json" 535 --suite long --models llama3-8b --layers 16 --deadline 480
  last=step_long_16
  ;;
*)
  echo "part $part is neither one of 1 to 9 nor all" && exit 2
  ;;
esac
echo
python3 bench/tables.py --show "$out/$last.json"
