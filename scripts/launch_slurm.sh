#!/usr/bin/env bash
# Several nodes under Slurm. Submit from the repository's root, on a file system that all nodes see:
#   sbatch --nodes 2 --gpus-per-node 8 --exclusive scripts/launch_slurm.sh train_pretrain.py --config configs/104m_pretrain.yaml
# Options before the script's name are sbatch's and win over the defaults below; all behind it is the training command.
# Near the time limit training saves and the job goes back into the queue, where the same command resumes (--resume auto).
# Without GPUs one process a node is started; NPROC=4 sbatch ... names another number.

#SBATCH --job-name=seedling
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%j.out
# requeued: what it prints is added to the same file
#SBATCH --open-mode=append
#SBATCH --requeue
# to this script alone (B:), 180 seconds before the time limit (Slurm may be a minute early): time enough to save
#SBATCH --signal=B:USR1@180

set -euo pipefail
if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh train_pretrain.py [flags]" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this script, so its own path leads nowhere
if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RDZV_ENDPOINT="$first_node:$((15000 + SLURM_JOB_ID % 15000))"  # below the ports that systems hand out
# a requeued job must not meet what is left of its earlier self
export RDZV_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
# else torchrun gives restarted workers the key-value store of the ones that failed, and they dial dead addresses
# (pytorch issues 135712 and 167288)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun kills workers that save for longer than this; its own default is 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

# Expanded on each node. exec: Slurm's signals reach torchrun itself. Who hosts the rendezvous and by which name the nodes
# find each other is told, not guessed from the machine's own idea of its name.
# shellcheck disable=SC2016
node='
nproc="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
if [ "$SLURM_CPUS_ON_NODE" -lt "$nproc" ]; then
    echo "warning: $SLURMD_NODENAME: $SLURM_CPUS_ON_NODE CPUs for $nproc processes; give sbatch --exclusive or --cpus-per-task" >&2
fi
exec torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$nproc" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_id "$RDZV_ID" --rdzv_endpoint "$RDZV_ENDPOINT" \
    --rdzv_conf "is_host=$((SLURM_NODEID == 0))" --local_addr "$SLURMD_NODENAME" "$@"'

# --cpu-bind: all cores the job has on the node, not one task's share; --wait: a torchrun that is gone ends the others, 150 s later
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --cpu-bind=none --wait=150 \
    bash -c "$node" launch_slurm "$@" &
training=$!

# The time limit is near. Not `kill $training`: srun takes SIGTERM for an order to kill everything at once.
time_is_up() {
    trap '' USR1
    echo "launch_slurm: the time limit is near; training is asked to save and stop"
    requeue=1
    scancel --signal=TERM "$SLURM_JOB_ID.0" || kill "$training" || true  # the latter if it has not even started
}
requeue='' ended=''
trap time_is_up USR1
# The whole job is being ended (scancel, preemption). Slurm tells every torchrun itself, and requeues where that is due; this
# script only has to live until they have saved.
trap ended=1 TERM

# a signal ends `wait` early; training has ended when its process is gone
status=0
while wait "$training" || status=$?; kill -0 "$training" 2>/dev/null; do status=0; done
if [ "$status" -eq 0 ] || [ -n "$ended" ]; then exit "$status"; fi
# Preemption with a grace time tells torchrun alone, and that looks like a failure from here.
if [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]]; then requeue=1; fi
if [ -z "$requeue" ]; then exit "$status"; fi
echo "launch_slurm: job $SLURM_JOB_ID goes back into the queue"
scontrol requeue "$SLURM_JOB_ID"
