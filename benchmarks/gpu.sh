#!/usr/bin/env bash
# The first hour on a GPU, in ten minutes; see gpu.py.  bash benchmarks/gpu.sh [--device cpu] [--out FOLDER] [--quick]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# gpu_node.sh sources this for its own script.
exec python3 "benchmarks/$(basename "$0" .sh).py" "$@"
