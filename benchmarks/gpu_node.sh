#!/usr/bin/env bash
# Several GPUs of one node, in ten minutes; see gpu_node.py.  bash benchmarks/gpu_node.sh [--gpus N] [--device cpu] [--out FOLDER]
# shellcheck source=benchmarks/gpu.sh
source "$(dirname "$0")/gpu.sh"
