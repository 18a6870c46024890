#!/usr/bin/env bash
# Look at the code without running it: lint, format, imports between rooms, types, names of tests.  bash tests/check.sh
# Installs what that needs, as tests/run.sh does. Every check runs, and any that fails makes this fail.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
bash launch/install.sh test || exit
bin=$PWD/.venv/bin

status=0
check() {
    echo "== $*"
    "$bin/$1" "${@:2}" || status=1
}
check ruff check .
check ruff format --check .
check lint-imports
check mypy
echo "== names of test files"
# pytest imports them by their names alone.
twice=$(find tests -name "test_*.py" -printf "%f\n" | sort | uniq -d)
if [ -n "$twice" ]; then
    echo "in two folders: $twice"
    status=1
fi
if command -v shellcheck >/dev/null; then
    echo "== shellcheck"
    shellcheck launch/*.sh tests/*.sh slurm/*.sh benchmarks/*.sh .ci/run || status=1
fi
exit "$status"
