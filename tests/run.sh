#!/usr/bin/env bash
# Install what the tests need and run them all:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

# The cluster tests run a real Slurm on this machine.
export PATH="$PATH:/usr/sbin:/sbin"
missing=()
for program in slurmctld slurmd munged shellcheck; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge shellcheck >/dev/null
    else
        echo "tests/run.sh: ${missing[*]} not found; install slurm-wlm, munge and shellcheck for the cluster tests" >&2
    fi
fi
bash launch/install.sh test

# Threads of ranks that share two cores would only wait for each other.
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m pytest "$@"
