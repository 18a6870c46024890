#!/usr/bin/env bash
# Train a few steps with ZeRO-3 on two ranks, export, evaluate and generate:  bash tests/train_export_generate.sh FOLDER
# With the python and deepspeed on PATH. Any line that a library prints as a warning of something deprecated is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$1
mkdir -p "$(dirname "$run")"

port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
{
    deepspeed --num_gpus 2 --master_port "$port" launch/train.py --ds_config ds_configs/zero3_fp32.json --out "$run" \
        train.max_steps=4 train.save_every=4 train.validate_every=2 train.validation_steps=1
    python launch/consolidate.py "$run" --out "$run/hf"
    python launch/evaluate.py --model "$run/hf" --lengths 5 --samples 8
    python launch/ask.py --model "$run/hf" "a:3|7:c|a:5|a?"
} 2>&1 | tee "$run.log"
! grep -i -E 'deprecat|FutureWarning' "$run.log"
