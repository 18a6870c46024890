#!/bin/bash
# Train on 8 nodes of 8 GPUs. From the repository's root, on a login node:
#
#   sbatch --job-name=NAME slurm/train_armt_8node.sh --config launch/configs/X.yaml [key=value ...]
#
# The arguments go to launch/train.py. The run's folder is runs/NAME: submitting NAME again resumes it. Another size is
# an option of sbatch (--nodes=4 --gpus-per-node=4; --gpus-per-node=0 trains on CPU), site settings are in slurm/env.sh.
# Before the time limit, and on `scancel --signal=USR1 --batch JOB`, the job checkpoints, requeues itself and resumes.
#SBATCH --job-name=armt
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# A line of the job's log. Where its disk is full the line is lost; the job must go on.
say() { echo "$(date -Is) $*" || true; }
complain() { echo "error: $*" >&2 || true; }

cd "$SLURM_SUBMIT_DIR"
if [[ ! -f slurm/env.sh ]]; then
    complain "SLURM_SUBMIT_DIR=$SLURM_SUBMIT_DIR is not the repository's root; run sbatch from there"
    exit 2
fi
source slurm/env.sh
read -ra srun_options <<< "$SRUN_OPTIONS"
read -ra container <<< "$CONTAINER"

restarts=${SLURM_RESTART_COUNT:-0}
run=${RUN_DIR:-runs/$SLURM_JOB_NAME${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}

# Its launcher starts all ranks of a node, so one task must see all GPUs of it.
if [[ ${SLURM_GPUS_PER_TASK:-} ]]; then
    complain "SLURM_GPUS_PER_TASK=$SLURM_GPUS_PER_TASK: one task starts all ranks of a node; use --gpus-per-node"
    exit 2
fi
# One rank per GPU, or one gloo rank on nodes without. Asked of the host: a container that was started without its GPU
# option then fails in the preflight instead of training on CPU.
found=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
# A site may count by type: h100:8.
allocated=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-$found}}
gpus=$((found > 0 ? ${allocated##*:} : 0))
ranks_per_node=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
# Each rank's threads next to its GPU.
binding=()
if ((gpus > 0)); then binding=(--numa-binding=node); fi

# Rank 0 is on the first node. Node names need not resolve on the nodes, so ask Slurm for the address that it uses.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
MASTER_ADDR=$(scontrol show node "$first" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# A secret of this job: nobody else knows its port, which is below the ephemeral ones, or where its ranks meet.
ARMT_JOB_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
MASTER_PORT=$((15000 + 16#${ARMT_JOB_SECRET:0:8} % 15000))
export ARMT_JOB_SECRET MASTER_ADDR MASTER_PORT

# An array's task by its own name: the id of one of them is also that of the whole array.
id=$SLURM_JOB_ID
if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# Checkpointed, and wants to go on: back into the queue under the same job id.
requeue() {
    if ((restarts >= MAX_RESTARTS)); then
        complain "MAX_RESTARTS=$MAX_RESTARTS reached; submit again to resume"
        exit 75
    fi
    say "requeue $id"
    if ! scontrol requeue "$id"; then
        complain "job $id may not requeue; submit again to resume"
        exit 75
    fi
    exit 0
}

# Into the queue without the nodes that the preflight named. Once: a job that meets unfit nodes again has another reason.
# Returns where that cannot be done, as for a job that asked for nodes by name: it would wait for ever.
requeue_elsewhere() {
    local once=$run/logs/$SLURM_JOB_ID.excluded unfit='' before asked
    if [[ -s $logs/unfit ]]; then IFS= read -r unfit < "$logs/unfit" || true; fi
    if [[ ! $unfit =~ ^[A-Za-z0-9._,-]+$ || -e $once ]] || ((restarts >= MAX_RESTARTS)); then return; fi
    asked=$(scontrol show job "$id" -o | sed -n 's/.* ReqNodeList=\([^ ]*\).*/\1/p')
    if [[ $asked && $asked != "(null)" ]]; then return; fi
    before=$(scontrol show job "$id" -o | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    if [[ $before && $before != "(null)" ]]; then unfit=$before,$unfit; fi
    touch "$once"
    say "requeue $id without $unfit"
    # A job's nodes can be changed while it waits, and this shell is ended once it does.
    trap '' TERM
    if scontrol requeuehold "$id" && scontrol update "jobid=$id" "ExcNodeList=$unfit" && scontrol release "$id"; then
        exit 0
    fi
    complain "job $id may not requeue; submit again with --exclude=$unfit"
}

# USR1 comes to this shell alone (B: above). Before training there is nothing to save, it is only remembered.
preempted=0
step=
# shellcheck disable=SC2317 # the trap calls it
on_usr1() {
    say "USR1: checkpoint and requeue"
    preempted=1
    if [[ $step ]]; then kill -USR1 "$step"; fi
}
trap on_usr1 USR1

# A mistake in the arguments is known in a second, without torch and before anything is written.
check=("${container[@]}" "$PYTHON")
if [[ $SRUN_OPTIONS ]]; then check=(srun --quiet --nodes=1 --ntasks=1 "${srun_options[@]}" "${check[@]}"); fi
"${check[@]}" launch/train.py --check=$((SLURM_NNODES * ranks_per_node)) --out "$run" "$@" || exit $?

logs=$run/logs/$SLURM_JOB_ID.$restarts
mkdir -p "$logs"
# Only the launchers of this start write it.
rm -rf "$logs/exit_code" "$logs/unfit"
# Both names: torch renamed the variable.
export TORCH_FR_DUMP_TEMP_FILE=$PWD/$logs/collectives_rank_ TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$PWD/$logs/collectives_rank_

say "job $SLURM_JOB_ID start $restarts: $SLURM_NNODES nodes x $ranks_per_node ranks ($SLURM_JOB_NODELIST)," \
    "master $MASTER_ADDR:$MASTER_PORT, run $run, logs $logs"

# One launcher per node, and the binding is its business, so srun binds nothing.
# If one task fails, srun ends the others; if one has ended, the others have a minute.
launch=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --cpu-bind=none "${srun_options[@]}"
    "${container[@]}" "$PYTHON")

code=0
"${launch[@]}" launch/preflight.py --nodes="$SLURM_NNODES" --gpus="$gpus" --folder="$run" --unfit="$logs/unfit" ||
    code=$?
if ((preempted)); then requeue; fi
if ((code)); then
    requeue_elsewhere
    exit "$code"
fi

# In the background, because bash runs a trap only between commands, and `wait` is one that a signal interrupts.
"${launch[@]}" launch/node.py --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks_per_node" --rdzv-id="$SLURM_JOB_ID" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --log-dir="$logs" "${binding[@]}" \
    launch/train.py --out "$run" --resume auto "$@" &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?

# The first rank's code that was not 0; srun's own is 143 as soon as it had to end the other nodes. Digits only: in
# arithmetic bash carries out what anything else may contain.
if [[ -f $logs/exit_code ]]; then
    first_code=
    IFS= read -r -n 4 first_code < "$logs/exit_code" || true
    if [[ $first_code =~ ^[1-9][0-9]{0,2}$ ]]; then code=$first_code; fi
fi
# "Checkpointed, start me again". Nothing else is requeued: a failure would fail again.
if ((code == 75)); then requeue; fi
# Not a mistake: a node may have died. Slurm notices after a while and requeues the job by itself; until then it must
# not end, or it would count as failed.
if ((code != 0 && code != 2)) && ! timeout 30 srun --quiet --overlap --ntasks-per-node=1 true; then
    say "a node does not answer: waiting up to $LOST_NODE_S s for Slurm to requeue the job"
    sleep "$LOST_NODE_S" &
    wait $! || true
fi
# Which rank the others waited for, if they did.
if ((code != 0 && code != 2)); then timeout 60 "${check[@]}" -m armt_dist.stuck "$run" || true; fi
say "job $SLURM_JOB_ID ends with exit code $code"
exit "$code"
