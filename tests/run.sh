#!/usr/bin/env bash
# Install what the tests need and run them:
#
#   bash tests/run.sh                      # all; as root, it also installs Slurm and shellcheck
#   bash tests/run.sh --quick              # unit tests, attacks and the cheapest of several ranks, in a quarter of an hour
#   bash tests/run.sh --long               # all, and runs of minutes of what other tests do in parts
#   bash tests/run.sh [pytest arguments]   # for example a file
#
# Tests whose requirements are missing are skipped; the last lines say which, and what would make them run.
# ARMT_NO_SKIPS=1 makes a skip an error.
set -euo pipefail
cd "$(dirname "$0")/.."

# Daemons of Slurm are in sbin.
export PATH="$PATH:/usr/sbin:/sbin"
if [ $# -eq 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    missing=()
    for program in slurmctld slurmd munged shellcheck; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge shellcheck; } >/dev/null ||
            echo "tests/run.sh: ${missing[*]} cannot be installed; the tests that need them are skipped" >&2
    fi
fi
bash launch/install.sh test

# Threads of ranks that share two cores would only wait for each other.
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"
# Where byte code is not written, every process of ours would compile the package.
.venv/bin/python -m compileall -q armt_dist tests
case "${1:-}" in
    '' | --quick | --long) ;;
    *) exec .venv/bin/python -m pytest "$@" ;;
esac

# While one test waits for processes to start, another file's run. Those of Slurm share one cluster.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" \
    tests/unit tests/ranks tests/hostile tests/commands || status=1
[ "${1:-}" = --quick ] || .venv/bin/python -m pytest "$@" tests/cluster || status=1
exit "$status"
