#!/usr/bin/env bash
# Everything that waits for a GPU, in three parts of at most ten minutes each; results as JSON, a short table last.
# usage: bash bench/gpu_session.sh OUT_DIR 1|2|3
#   1  tests, smoke of every contender, una_fast against the bare matrix products
#   2  the peers at every shape, then accuracy
#   3  forward variants, row kernels and vocabulary slices; time and memory up to N = 131072; many short responses
# A folder peers/ of wheels (or .tar.xz of installed files) at the repository root is unpacked beside the machine's
# packages. Afterwards: python bench/tables.py --merge OUT_DIR/head_*.json
set -uo pipefail
out=${1:?usage: gpu_session.sh OUT_DIR 1|2|3}
part=${2:?usage: gpu_session.sh OUT_DIR 1|2|3}
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

bench() { # JSON SECONDS ARGUMENTS...: again without a contender that broke the GPU's context (status 75)
  local json=$1 end=$((SECONDS + $2)) status=75
  shift 2
  while [ $status -eq 75 ] && [ $((end - SECONDS)) -gt 20 ]; do
    local left=$((end - SECONDS))
    timeout -k 5 $left python3 bench/bench_head.py --device cuda --out "$json" --resume --budget $((left - 50)) "$@"
    status=$?
  done 2>&1 | tee -a "${json%.json}.log"
}

rm -f "$out"/head_*.json "$out/smoke.json"
case $part in
1)
  # -P: the repository root off sys.path, where kernels/ would hide the package of that name
  timeout -k 5 150 python3 -P -m pytest tests/test_gpu.py -q 2>&1 | tee "$out/tests.log" | tail -25
  few="4095 or linear or loss or gather or segment or offsets" # every kernel and dtype, one shape of the row kernels
  timeout -k 5 100 python3 -P -m pytest tests/test_kernels.py -q -k "$few" 2>&1 | tee "$out/kernels.log" | tail -12
  if command -v compute-sanitizer >"$out/sanitizer.log"; then # shared memory alone: the rest is the hundred repeats
    timeout -k 5 30 compute-sanitizer --tool racecheck --error-exitcode 9 \
      python3 -P -m pytest tests/test_kernels.py -q -k "test_row_kernels and 4095 and plain" >>"$out/sanitizer.log" 2>&1
    echo "racecheck: exit status $?"
  fi
  bench "$out/smoke.json" 80 --suite smoke --warmup 45
  bench "$out/head_bars.json" 190 --suite bars --seconds 8
  last=head_bars
  ;;
2)
  bench "$out/head_peers.json" 525 --suite peers,accuracy --seconds 8 --warmup 60
  last=head_peers
  ;;
3)
  bench "$out/head_long.json" 105 --suite forward,slices --seconds 4
  bench "$out/head_long.json" 420 --suite memory,layouts --seconds 8 --warmup 60
  last=head_long
  ;;
*)
  echo "part $part is not 1, 2 or 3" && exit 2
  ;;
esac
echo
python3 bench/tables.py --show "$out/$last.json"
