#!/usr/bin/env bash
# Test deploy/slurm.sh with a Slurm on this machine, whose two nodes are two daemons: a run of two ranks, and one that
# gets SIGTERM, is queued again and resumes. Needs root and Debian's slurm-wlm and munge.
#   benchmarks/scale/local_slurm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD here=$(mktemp -d)
export SLURM_CONF=$here/slurm.conf PYTHONPATH=$top PYTHON=${PYTHON:-python} ALIGN_HEAD=127.0.0.1 OMP_NUM_THREADS=1

cat > "$SLURM_CONF" <<CONF
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool-%n
SlurmctldPidFile=$here/ctld.pid
SlurmdPidFile=$here/slurmd-%n.pid
SlurmctldLogFile=$here/ctld.log
SlurmdLogFile=$here/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=2000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
stop() { for pid in "$here"/*.pid; do kill "$(cat "$pid")" || true; done; }
trap stop EXIT
mkdir -p "$here/state" /run/munge
chown munge: /run/munge
pgrep -x munged > /dev/null || su -s /bin/sh munge -c munged
slurmctld -f "$SLURM_CONF"
slurmd -N n1 -f "$SLURM_CONF"
slurmd -N n2 -f "$SLURM_CONF"

cd "$here"
line=(stage=ppo init=sft:s reward=sentiment stage.updates=8 stage.batch_size=8 stage.minibatches=1 stage.micro_batch=4
    rollout.batch_size=4 rollout.max_new_tokens=8 stage.normalise_on=8 stage.save_every=1)
"$PYTHON" -m align stage=sft run.name=s stage.max_steps=2 stage.eval_size=8
"$PYTHON" -m align "${line[@]}" run.name=alone
sbatch --wait --nodes=2 --output="$here/whole.txt" "$top/deploy/slurm.sh" "${line[@]}" run.name=whole
job=$(sbatch --parsable --nodes=2 --output="$here/cut.txt" "$top/deploy/slurm.sh" "${line[@]}" run.name=cut)
until [[ -d runs/ppo/cut/checkpoints/checkpoint-2 ]]; do sleep 0.2; done
scancel --signal=TERM --batch "$job" # as at the time limit
until grep -q '"status": "done"' runs/ppo/cut/manifest.json; do sleep 2; done
grep --fixed-strings "continuing from checkpoint" "$here/cut.txt"
for name in whole cut; do cmp runs/ppo/alone/metrics.jsonl "runs/ppo/$name/metrics.jsonl"; done
echo "two ranks under Slurm, and a job that went back into the queue: the bits of one process"
