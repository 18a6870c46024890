#!/bin/bash
# Train on one node of 8 GPUs: sbatch --job-name=NAME slurm/train_armt_1node.sh --config FILE.yaml [key=value ...]
# All else is as in train_armt_8node.sh, which this runs.
#SBATCH --job-name=armt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
source "$SLURM_SUBMIT_DIR/slurm/train_armt_8node.sh"
