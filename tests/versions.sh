#!/usr/bin/env bash
# Run the tests with other versions: tests/versions.sh floor|ceiling [pytest arguments]
#
# The environment stands in $VERSIONS_DIR (default: una_fast_versions in $TMPDIR), and is built when
# it is missing or when the pins have changed. The pins are those of constraints.txt, with the lines
# of tests/versions/floor.txt or ceiling.txt in place of lines of the same names.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-}
own=tests/versions/$name.txt
[ -f "$own" ] || { sed -n '2s/# //p' "$0" >&2; exit 2; }
shift
venv=${VERSIONS_DIR:-${TMPDIR:-/tmp}/una_fast_versions}/$name

pins=$(awk -F== '/^#/ {next} NR == FNR {own[$1]; print; next} !($1 in own)' "$own" constraints.txt)
# pins.txt appears last, so that an interrupted build starts again
if [ "$pins" != "$(cat "$venv/pins.txt" 2>/dev/null)" ]; then
  python3 -m venv --clear "$venv"
  echo "$pins" >"$venv/wanted.txt"
  "$venv/bin/pip" install --progress-bar off -c "$venv/wanted.txt" -e ".[test,trl,optim,liger]"
  mv "$venv/wanted.txt" "$venv/pins.txt"
fi
# an environment of another checkout would test the other's code
if [ "$PWD" != "$(cat "$venv/checkout.txt" 2>/dev/null)" ]; then
  "$venv/bin/pip" install --no-deps -e .
  echo "$PWD" >"$venv/checkout.txt"
fi
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/pytest" -n 1 "$@"
