#!/usr/bin/env bash
# One run of align on several machines, under Slurm. What follows is the stage's own command line.
#   sbatch --nodes=2 --gpus-per-node=8 deploy/slurm.sh stage=ppo run.root=/shared/runs model=hub model.path=/shared/models/NAME
# docs/scaling.md says what has to lie on shared storage. PYTHON names the Python that has align; ALIGN_RANKS how many
# ranks a machine has, where that is not its number of GPUs.
#SBATCH --job-name=align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@60
set -euo pipefail

python=${PYTHON:-python}
ranks=${ALIGN_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# What torchrun reads too: align starts the ranks of each machine by the same launcher.
export PET_NNODES=$SLURM_NNODES
export PET_RDZV_BACKEND=c10d
export PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export PET_RDZV_ENDPOINT=${ALIGN_HEAD:-$head}:$((20000 + SLURM_JOB_ID % 20000))

# Slurm sends TERM a minute before the time limit (--signal). The run then ends by itself, and the job goes back into the
# queue, where the same command continues from the last checkpoint.
requeue() {
    scancel --signal=TERM "$SLURM_JOB_ID" # all steps, and not this script
    wait "$job" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM

srun --kill-on-bad-exit=0 --cpu-bind=none "$python" -m align "$@" "devices=$ranks" &
job=$!
wait "$job"
