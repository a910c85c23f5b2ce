#!/bin/bash
# Proof on a real SLURM (Debian's slurm-wlm) that training survives preemption: a cluster of one node
# is installed and started, a job is submitted with scripts/slurm/train.sbatch, then it is told to
# stop (SIGUSR1, as before a time limit) and preempted by a job of higher priority. It must requeue
# both times and end with the weights of an undisturbed run.
#
#   tests/slurm/run.sh          as root on Debian or Ubuntu; about ten minutes on two cores
#
# Nothing is left running; files are in a new folder below /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
work=$(mktemp -d /tmp/slurm-test.XXXXXX)
export SLURM_CONF=$work/slurm.conf
steps=60

if ! command -v slurmctld munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null
fi

stop() {
    scancel --state=RUNNING --quiet 2>/dev/null || true
    for daemon in slurmctld slurmd munged; do
        if [ -f "$work/$daemon.pid" ]; then kill "$(cat "$work/$daemon.pid")" 2>/dev/null || true; fi
    done
}
trap stop EXIT

# A munge of our own, so that one already running is left alone.
head -c 128 /dev/urandom > "$work/munge.key"
chmod 400 "$work/munge.key"
chmod 755 "$work"
munged --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/munge.seed" --force

host=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
SlurmctldPort=46817
SlurmdPort=46818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MpiDefault=none
NodeName=$host CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=9 State=UP
CONF
mkdir "$work/state" "$work/spool"
slurmctld
slurmd
for _ in $(seq 30); do
    if sinfo -h -o %T 2>/dev/null | grep -q idle; then break; fi
    sleep 1
done

"$PYTHON" scripts/make_tiles.py --out "$work/tiles" --train 20 --train5 2 --val 4 --test 2 --classes ADI TUM
export HISTO_DATA=$work/tiles OMP_NUM_THREADS=1
overrides=(lightning.trainer.max_steps=$steps lightning.trainer.val_check_interval=$steps
    lightning.modelcheckpoint.params.every_n_train_steps=1000 lightning.trainer.log_every_n_steps=1)
"$PYTHON" main.py --base configs/demo/autoencoder.yaml -t --logdir "$work/logs" --name whole \
    "${overrides[@]}" 2> "$work/whole.log"

submit() {
    sbatch --parsable --chdir="$PWD" --gpus-per-node=0 --cpus-per-task=1 --ntasks-per-node=1 \
        --output="$work/job.log" scripts/slurm/train.sbatch --base configs/demo/autoencoder.yaml \
        --logdir "$work/logs" --name requeued "${overrides[@]}"
}
restarts() { scontrol show job "$job" | grep -o 'Restarts=[0-9]*' | cut -d= -f2; }
state() { scontrol show job "$job" | grep -o 'JobState=[A-Z]*' | cut -d= -f2; }
fail() { echo "FAILED: $1" >&2; cat "$work/job.log" >&2; exit 1; }
logged() { { find "$work/logs/requeued" -name metrics.csv -exec cat {} + 2>/dev/null || true; } | wc -l; }
training() {  # until start number $1 of the job has logged more than it found
    local before
    before=$(logged)
    for _ in $(seq 420); do  # SLURM waits two minutes before a requeued job starts
        if [ "$(restarts)" = "$1" ] && [ "$(logged)" -gt $((before + 3)) ]; then return; fi
        if [ "$(state)" = COMPLETED ]; then fail "it ended before it could be disturbed"; fi
        sleep 1
    done
    fail "start $1 did not begin to train"
}

job=$(submit)
training 0
scancel --signal=USR1 "$job"
training 1
grep -q "stopped by SIGUSR1 after step" "$work/job.log" || fail "no word of the signal"
sbatch --parsable --partition=high --output=/dev/null --wrap="sleep 2" > /dev/null
training 2
grep -q "stopped by SIGTERM after step" "$work/job.log" || fail "no word of the preemption"
for _ in $(seq 300); do
    if [ "$(state)" = COMPLETED ]; then break; fi
    sleep 1
done
[ "$(state)" = COMPLETED ] || fail "it did not end: $(state)"
[ "$(restarts)" = 2 ] || fail "it was requeued $(restarts) times, not twice"
"$PYTHON" - "$work/logs" <<'CHECK'
import sys
import torch
from ldm.checkpoint import read_checkpoint

whole, requeued = (read_checkpoint(f"{sys.argv[1]}/{name}") for name in ("whole", "requeued"))
assert requeued["global_step"] == whole["global_step"], requeued["global_step"]
state = whole["state_dict"]
assert all(torch.equal(state[k], requeued["state_dict"][k]) for k in state), "weights differ"
CHECK
grep "stopped by" "$work/job.log"
echo "passed: requeued twice, $steps steps, the weights of an undisturbed run"
