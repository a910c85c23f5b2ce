# Sourced by the .sbatch files of this folder, which are submitted from the repository's folder.
#
#   stage SCRIPT ARGUMENTS...   runs it in the tasks of this job; one that was stopped is requeued
#   named ARGUMENTS...          sets `name`: `--name JOB-ID`, unless a name or run is among them
#
# What is the same for all jobs of a site comes from the environment, which sbatch hands on:
#
#   SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS   sbatch's own
#   HISTO_SETUP       a file to source first: modules, conda, data roots, NCCL settings
#   PYTHON            the interpreter; python when not set
#   HISTO_RESTARTS    how often a job requeues itself at most (100)

STOPPED=75    # exit status of a command that was stopped and goes on when it is run again
ON_USR1=138   # 128 + SIGUSR1, ON_TERM=143: ended by the signal itself, in a stage that goes on from
ON_TERM=143   # what it has finished, or in one that had not begun to train

if [ ! -f main.py ]; then
    echo "error: $PWD is not the repository's folder; submit from there, or with --chdir" >&2
    exit 2
fi
if [ -n "${HISTO_SETUP:-}" ]; then . "$HISTO_SETUP" || exit 2; fi
# Since SLURM 22.05 srun does not take this from the job, and each task would get one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export PYTHONUNBUFFERED=1

stage() {
    local status
    # Ranks that are stopped end at the same step, but not in the same second: ending the others at
    # once, as --kill-on-bad-exit does, would hide their status. At the end of a command the first
    # rank is the last to leave (it writes manifests and shards). So the others of a rank that has
    # ended get a quarter of an hour; most notice a crash at once by themselves.
    srun --kill-on-bad-exit=0 --wait=900 "${PYTHON:-python}" "$@"
    status=$?
    case $status in
        "$STOPPED" | "$ON_USR1" | "$ON_TERM") requeue ;;
    esac
    exit "$status"
}

requeue() {
    local job=$SLURM_JOB_ID
    # One element of an array: its number may be that of the whole array.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${HISTO_RESTARTS:-100}" ]; then
        echo "stopped, and not requeued: HISTO_RESTARTS=${HISTO_RESTARTS:-100}" >&2
    else
        scontrol requeue "$job"
    fi
}

named() {
    local word
    name=(--name "$SLURM_JOB_NAME-$SLURM_JOB_ID")
    for word in "$@"; do
        case $word in
            -n | --name | --name=* | -r | --resume | --resume=* | --dry-run) name=() ;;
        esac
    done
}
