#!/usr/bin/env bash
# All checks and tests, in the same environment as the quickstart: lint, types, pytest on both cores.
#   bash scripts/test.sh                 everything but drills of minutes
#   bash scripts/test.sh --all           those too (marked slow)
#   bash scripts/test.sh tests/model     only these, passed on to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

which=(-m "not slow")
if [ "${1:-}" = --all ]; then
    which=()
    shift
fi
ruff check .
ruff format --check .
mypy
# one thread a process: two workers share two cores; a file's tests stay together, since they share costly fixtures
OMP_NUM_THREADS=1 pytest -n 2 --dist loadscope --no-loadscope-reorder "${which[@]}" "$@"
