#!/usr/bin/env bash
# From nothing to a trained, evaluated and exported ARMT:  bash launch/quickstart.sh
# Two CPU ranks over gloo, or all GPUs where there are some. Run it again to see the results again.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/quickstart
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    # Parts of a partitioned GPU (MIG) are listed below it. A power of two divides the batch.
    gpus=$(nvidia-smi -L | grep -c '^GPU') ranks=1
    while [ $((2 * ranks)) -le "$gpus" ]; do
        ranks=$((2 * ranks))
    done
    ds_config=ds_configs/zero3.json options=()
else
    ranks=2
    # What is free holds all graphs of so small a model, so that nothing is run again.
    ds_config=ds_configs/zero3_fp32.json options=(bptt.keep=auto)
    export OMP_NUM_THREADS=1
fi

echo "== train: ZeRO-3 on $ranks ranks"
# A port of its own: another run on this machine may hold the usual one.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
deepspeed --num_gpus "$ranks" --master_port "$port" launch/train.py --ds_config "$ds_config" --out "$run" "${options[@]}"

echo "== consolidate to a Hugging Face folder"
rm -rf "$run/hf"
python launch/consolidate.py "$run" --out "$run/hf"

echo "== evaluate, segment by segment"
python launch/evaluate.py --model "$run/hf" --lengths 5 10 20 50 --out "$run/evaluation"

echo "== ask it: the latest value of key a; plain transformers in a process of its own"
(cd / && python -I "$OLDPWD/launch/ask.py" --model "$OLDPWD/$run/hf" "a:3|7:c|a:5|a?")

cat <<TABLE

what                  where
checkpoint            $run/checkpoints/$(cat "$run/checkpoints/latest")
metrics               $run/metrics.jsonl
TensorBoard           tensorboard --logdir $run/tensorboard
accuracy by length    $run/evaluation/evaluation.json
plot                  $(ls "$run"/evaluation/*.png)
Hugging Face folder   $run/hf
TABLE
