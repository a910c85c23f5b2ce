# A SLURM cluster of two nodes on this machine, for the proofs beside it. Sourced, not run: it gives
# the functions start_cluster and stop_cluster.
#
# Needs root and Debian's or Ubuntu's slurm-wlm, which it installs where it is missing. Everything is
# in $work, a new folder below /tmp; daemons end with the shell. Two slurmd on one machine need one
# that was built for it (Debian's is): nodes are then "one" and "two", with two CPUs each.
work=$(mktemp -d /tmp/slurm-test.XXXXXX)
chmod 755 "$work"
export SLURM_CONF=$work/slurm.conf

if ! command -v slurmctld munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null
fi

stop_cluster() {
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    sleep 1
    local pid
    for pid in "$work"/*.pid; do
        if [ -f "$pid" ]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
    done
}

start_cluster() {
    # A munge of our own, so that one already running is left alone.
    head -c 128 /dev/urandom > "$work/munge.key"
    chmod 400 "$work/munge.key"
    munged --key-file="$work/munge.key" --socket="$work/munge.socket" \
        --pid-file="$work/munged.pid" --log-file="$work/munged.log" --seed-file="$work/munge.seed" \
        --force
    local host port
    host=$(hostname -s)
    port=$((20000 + $$ % 10000)) # of this shell: another such cluster may be running
    # cred_expire is also how long a requeued job waits; two minutes when not set.
    cat > "$SLURM_CONF" <<CONF
ClusterName=proof
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
SlurmctldPort=$port
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=7200
MpiDefault=none
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 State=UNKNOWN
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=9 State=UP
CONF
    mkdir "$work/state" "$work/spool-one" "$work/spool-two"
    slurmctld
    slurmd -N one
    slurmd -N two
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -p low -o %T 2>/dev/null | grep -c idle)" = 2 ]; then return; fi
        sleep 1
    done
    tail "$work"/slurm*.log >&2
    echo "FAILED: the cluster did not start" >&2
    exit 1
}
