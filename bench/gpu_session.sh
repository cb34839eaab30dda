#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: tests, then benches, then a short table.
# usage: bash bench/gpu_session.sh OUT_DIR [PEER_WHEELS_DIR]
set -uo pipefail
out=${1:?usage: gpu_session.sh OUT_DIR [PEER_WHEELS_DIR]}
mkdir -p "$out"
if [ -n "${2:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/peers "$2"/*.whl
  export PYTHONPATH=/tmp/peers${PYTHONPATH:+:$PYTHONPATH}
fi
python3 -m pip install -q -e . --no-deps --no-build-isolation
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
timeout 240 pytest -m gpu -q 2>&1 | tee "$out/tests.log" | tail -15
timeout 300 python3 bench/bench_head.py --device cuda --out "$out/head_gpu.json" 2>&1 | tee "$out/bench.log" | tail -40
