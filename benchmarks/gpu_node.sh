#!/usr/bin/env bash
# Several GPUs of one node, in ten minutes; see gpu_node.py.  bash benchmarks/gpu_node.sh [--gpus N] [--device cpu] [--out FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 benchmarks/gpu_node.py "$@"
