#!/usr/bin/env bash
# Everything that waits for a GPU, in one go.
# usage: bash bench/gpu_session.sh OUT_DIR
set -uo pipefail
out=${1:?usage: gpu_session.sh OUT_DIR}
mkdir -p "$out"
python3 -m pip install -q -e . --no-deps --no-build-isolation
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
timeout 400 pytest -m gpu -q 2>&1 | tee "$out/tests.log" | tail -30
