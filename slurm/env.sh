# shellcheck shell=bash
# Site settings, sourced by every script in this folder. Whatever the environment sets already wins, so that
# `PYTHON=... sbatch slurm/...` works without editing. Account and partition need no line here: Slurm itself reads
# SBATCH_ACCOUNT and SBATCH_PARTITION, or the sbatch options of those names.

# Modules, for example:
# module load cuda/12.8 nccl/2.26

# The Python that has armt_dist and its requirements, inside the container if there is one.
: "${PYTHON:=python}"

# pyxis/enroot: options of srun, for example
# SRUN_OPTIONS="--container-image=/shared/armt.sqsh --container-mounts=/shared,$PWD --container-workdir=$PWD"
: "${SRUN_OPTIONS:=}"
# apptainer: what stands before the command, for example
# CONTAINER="apptainer exec --nv --bind /shared /shared/armt.sif"
: "${CONTAINER:=}"

# Times a job may requeue itself.
: "${MAX_RESTARTS:=20}"

# Seconds that a job waits for Slurm to requeue it after a node has died; more than the site's SlurmdTimeout
# (scontrol show config), which is 300 unless changed.
: "${LOST_NODE_S:=360}"

# The network that NCCL and gloo meet on. Both guess; where a node has several networks, say which.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# InfiniBand: export NCCL_IB_HCA=mlx5
# A node with several rails: NCCL takes the adapters nearest to each GPU by itself. Leave out those of the storage network:
# export NCCL_IB_HCA=^mlx5_2,mlx5_5
# AWS EFA, with aws-ofi-nccl on LD_LIBRARY_PATH: export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Flight recorder: when a collective times out, every rank writes its last 2000 into the run's log folder.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Without the C++ stack traces that torch prints as warnings when its peers leave.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTHONUNBUFFERED=1
