#!/bin/bash
# Turn a run's last checkpoint into a Hugging Face folder, on CPU:
#
#   sbatch slurm/consolidate.sh runs/NAME --out runs/NAME/export
#
# The arguments go to launch/consolidate.py. It maps the shards from disk and holds one piece of one tensor at a time.
#SBATCH --job-name=armt-consolidate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
source slurm/env.sh
read -ra srun_options <<< "$SRUN_OPTIONS"
read -ra container <<< "$CONTAINER"
srun --ntasks=1 "${srun_options[@]}" "${container[@]}" "$PYTHON" launch/consolidate.py "$@"
