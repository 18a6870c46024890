#!/bin/bash
# Evaluate an exported model at many lengths at once, one array task and one GPU for each:
#
#   sbatch --array=10,20,50,100 slurm/evaluate.sh --model runs/NAME/export
#
# An array index is a length; each task has a folder of its own, runs/evaluation/JOB/LENGTH. The other arguments go to launch/evaluate.py.
#SBATCH --job-name=armt-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --array=10,20,50
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
source slurm/env.sh
read -ra srun_options <<< "$SRUN_OPTIONS"
read -ra container <<< "$CONTAINER"
srun --ntasks=1 "${srun_options[@]}" "${container[@]}" "$PYTHON" launch/evaluate.py \
    --lengths "$SLURM_ARRAY_TASK_ID" --out "runs/evaluation/$SLURM_ARRAY_JOB_ID/$SLURM_ARRAY_TASK_ID" "$@"
