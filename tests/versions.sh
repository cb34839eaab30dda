#!/usr/bin/env bash
# Run the tests with other versions: tests/versions.sh floor|ceiling|hosts|hosts-5.6… [pytest arguments]
#
# The environment stands in $VERSIONS_DIR (default: una_fast_versions in $TMPDIR), and is built when
# it is missing or when the pins have changed. The pins are those of constraints.txt, with the lines
# of tests/versions/floor.txt or ceiling.txt in place of lines of the same names.
#
# hosts-*.txt are what other trainers pin. Beside the core, without the extra `train`, such an
# environment has pytest and the packages of the file, and runs the tests of the op, of packing and
# of the integrations. `hosts` runs all of them in turn.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-}
if [ "$name" = hosts ]; then
  shift
  failed=
  for file in tests/versions/hosts-*.txt; do
    host=$(basename "$file" .txt)
    echo "== $host"
    "$0" "$host" "$@" || failed="$failed $host"
  done
  [ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
  exit 0
fi
own=tests/versions/$name.txt
[ -f "$own" ] || { sed -n '2s/# //p' "$0" >&2; exit 2; }
shift
venv=${VERSIONS_DIR:-${TMPDIR:-/tmp}/una_fast_versions}/$name
wanted=(-e ".[train,test,trl,optim,liger]")
tests=()
case $name in hosts-*)
  mapfile -t beside < <(awk -F== '/^#/ {next} {print $1}' "$own")
  wanted=(-e . pytest pytest-xdist "${beside[@]}")
  tests=(tests/test_head.py tests/test_feedback.py tests/test_losses.py tests/test_attention.py)
  for file in tests/test_integrations*.py tests/test_layout.py tests/test_verl.py tests/test_nemo_rl.py; do
    [ ! -f "$file" ] || tests+=("$file")
  done
  # a file or a test of the caller's own takes the place of the list
  for word in "$@"; do [[ $word != tests/* ]] || tests=(); done
esac

pins=$(awk -F== '/^#/ {next} NR == FNR {own[$1]; print; next} !($1 in own)' "$own" constraints.txt)
# pins.txt appears last, so that an interrupted build starts again
if [ "$pins" != "$(cat "$venv/pins.txt" 2>/dev/null)" ]; then
  python3 -m venv --clear "$venv"
  echo "$pins" >"$venv/wanted.txt"
  "$venv/bin/pip" install --progress-bar off -c "$venv/wanted.txt" "${wanted[@]}"
  mv "$venv/wanted.txt" "$venv/pins.txt"
fi
# an environment of another checkout would test the other's code
if [ "$PWD" != "$(cat "$venv/checkout.txt" 2>/dev/null)" ]; then
  "$venv/bin/pip" install --no-deps -e .
  echo "$PWD" >"$venv/checkout.txt"
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/pytest" -n 1 "${tests[@]}" "$@"
