#!/usr/bin/env bash
# Run the tests of the axolotl plugin beside axolotl 0.19: tests/axolotl.sh [pytest arguments]
#
# The environment stands in $VERSIONS_DIR (default: una_fast_versions in $TMPDIR), and is built when
# it is missing or when tests/versions/axolotl.txt has changed. Some 3 GB, and minutes.
# TRL=1.14.2 tests/axolotl.sh tests/test_trl_before_seam.py runs the trainers beside another TRL.
set -euo pipefail
cd "$(dirname "$0")/.."
own=tests/versions/axolotl.txt
trl=${TRL:-$(awk -F== '$1 == "trl" {print $2}' "$own")}
venv=${VERSIONS_DIR:-${TMPDIR:-/tmp}/una_fast_versions}/axolotl

# pins.txt appears last, so that an interrupted build starts again
if ! cmp -s "$own" "$venv/pins.txt"; then
  python3 -m venv --clear "$venv"
  awk '!/^#/ && !/# alone/' "$own" >"$venv/whole.txt"
  awk '/# alone/ {print $1}' "$own" >"$venv/alone.txt"
  "$venv/bin/pip" install --progress-bar off -r "$venv/whole.txt"
  "$venv/bin/pip" install --progress-bar off --no-deps -r "$venv/alone.txt"
  cp "$own" "$venv/pins.txt"
fi
# an environment of another checkout would test the other's code
if [ "$PWD" != "$(cat "$venv/checkout.txt" 2>/dev/null)" ]; then
  "$venv/bin/pip" install --no-deps -e .
  echo "$PWD" >"$venv/checkout.txt"
fi
if [ "$("$venv/bin/pip" list --format=freeze | awk -F== '$1 == "trl" {print $2}')" != "$trl" ]; then
  "$venv/bin/pip" install --no-deps "trl==$trl"
fi
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/test_axolotl.py tests/test_trl_before_seam.py)
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/pytest" "${tests[@]}"
