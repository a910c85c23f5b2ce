#!/bin/bash
# Proofs on a real SLURM that the jobs of scripts/slurm stop, requeue and go on: a cluster of two
# nodes (two slurmd on this machine) is installed and started, and each proof submits jobs to it.
#
#   tests/slurm/run.sh                  all of them, as root on Debian or Ubuntu: 18 minutes on one core
#   tests/slurm/run.sh requeue cancel   only these
#
#   requeue   training is told to stop (as before the time limit), then preempted by another job: it
#             requeues both times and ends with the weights of an undisturbed run
#   nodes     the same on two nodes, by the signal; weights of two ranks on one machine
#   tasks     the same with two tasks on one node
#   cancel    a job that is cancelled is not requeued
#   sample    two tasks are stopped and requeued; then an array of two: the images of one process
#   latents   two nodes encode, are stopped and requeued: the files of one process
#   evaluate  one element of an array is stopped: it alone is requeued; then one summary of both
#   command   index and shards
#
# Nothing is left running; files are in a new folder below /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
proofs=${*:-requeue nodes tasks cancel sample latents evaluate command}
PATIENCE=${PATIENCE:-600} # seconds for whatever is waited for
for proof in $proofs; do
    grep -q "^#   $proof " "$0" || { echo "no proof $proof; see the top of $0" >&2; exit 2; }
done

. tests/slurm/cluster.sh
trap stop_cluster EXIT
start_cluster

export HISTO_DATA=$work/tiles OMP_NUM_THREADS=1
export MASTER_ADDR=127.0.0.1 # the two nodes have no names that resolve
"$PYTHON" scripts/make_tiles.py --out "$work/tiles" --train 20 --train5 4 --val 4 --test 2 \
    --classes ADI TUM

fail() {
    echo "FAILED: $1" >&2
    tail -n 50 "$log" >&2
    exit 1
}
passed() { echo "passed: $1 ($((SECONDS - began)) s)"; }
wait_for() { # what, then a command that is repeated until it succeeds
    local what=$1
    shift
    for _ in $(seq "$PATIENCE"); do
        if "$@"; then return; fi
        sleep 1
    done
    fail "waited in vain until $what"
}
field() { scontrol show job "$2" | grep -o "$1=[A-Za-z0-9]*" | head -n 1 | cut -d= -f2; }
is() { [ "$(field "$1" "$job")" = "$2" ]; } # field, value
completed() {
    if is JobState FAILED; then fail "job $job failed"; fi
    is JobState COMPLETED
}
submit() { # options of sbatch and a file of scripts/slurm, then its arguments
    sbatch --parsable --chdir="$PWD" --gpus-per-node=0 --cpus-per-task=1 --output="$log" "$@"
}
lines() { { cat $1 2>/dev/null || true; } | wc -l; } # a pattern of files

# --- training

steps=60
overrides=(lightning.trainer.max_steps=$steps lightning.trainer.val_check_interval=$steps
    lightning.modelcheckpoint.params.every_n_train_steps=1000 lightning.trainer.log_every_n_steps=1)
training=(--base configs/demo/autoencoder.yaml --logdir "$work/logs" "${overrides[@]}")

undisturbed() { # ranks; a run without SLURM to compare with
    if [ ! -d "$work/logs/whole$1" ]; then
        "$PYTHON" main.py -t --devices "$1" --name "whole$1" "${training[@]}" \
            > "$work/whole$1.log" 2>&1 ||
            { log=$work/whole$1.log; fail "the undisturbed run failed"; }
    fi
}
metrics="metrics/version_*/metrics.csv"
has_logged() { [ "$(lines "$work/logs/$run/$metrics")" -gt "$1" ]; }
trains() { # until start number $1 of the job has logged more than there was
    local before
    before=$(lines "$work/logs/$run/$metrics")
    wait_for "start $1 begins" is Restarts "$1"
    wait_for "start $1 trains" has_logged $((before + 3))
    if is JobState COMPLETED; then fail "it ended before it could be disturbed"; fi
}
same_weights() { # run, another
    "$PYTHON" - "$work/logs" "$@" <<'CHECK'
import sys
import torch
from ldm.checkpoint import read_checkpoint

one, other = (read_checkpoint(f"{sys.argv[1]}/{name}") for name in sys.argv[2:])
assert one["global_step"] == other["global_step"], (one["global_step"], other["global_step"])
weights = one["state_dict"]
differ = [name for name in weights if not torch.equal(weights[name], other["state_dict"][name])]
assert not differ, f"{len(differ)} of {len(weights)} weights differ, such as {differ[0]}"
CHECK
}

proof_requeue() {
    run=requeued
    undisturbed 1
    job=$(submit --ntasks-per-node=1 scripts/slurm/train.sbatch "${training[@]}" --name $run)
    trains 0
    scancel --signal=USR1 "$job"
    trains 1
    grep -q "stopped by SIGUSR1 after step" "$log" || fail "no word of the signal"
    # Both nodes, so that it must make way.
    submit --nodes=2 --ntasks-per-node=2 --partition=high --output=/dev/null --wrap="sleep 2" \
        > /dev/null
    trains 2
    grep -q "stopped by SIGTERM after step" "$log" || fail "no word of the preemption"
    wait_for "job $job ends" completed
    is Restarts 2 || fail "it was requeued $(field Restarts "$job") times, not twice"
    same_weights whole1 $run || fail "not the undisturbed run"
    passed "requeued by a signal and by a preemption, the weights of an undisturbed run"
}

several_ranks() { # run, nodes, tasks per node
    run=$1
    undisturbed 2
    job=$(submit --nodes="$2" --ntasks-per-node="$3" scripts/slurm/train.sbatch "${training[@]}" \
        --name "$run")
    trains 0
    scancel --signal=USR1 "$job"
    trains 1
    grep -q "stopped by SIGUSR1 after step" "$log" || fail "no word of the signal"
    wait_for "job $job ends" completed
    is NumNodes "$2" && is NumTasks 2 || fail "it was not $2 nodes and 2 tasks"
    same_weights whole2 "$run" || fail "not the undisturbed run"
}

proof_nodes() {
    several_ranks nodes 2 1
    passed "two nodes, requeued, the weights of two ranks on one machine"
}

proof_tasks() {
    several_ranks tasks 1 2
    passed "two tasks of one node, requeued, the weights of two ranks without SLURM"
}

proof_cancel() {
    job=$(submit --ntasks-per-node=1 --job-name=gone scripts/slurm/train.sbatch "${training[@]}")
    run=gone-$job # a name is made up where none is given
    trains 0
    scancel "$job"
    wait_for "job $job is cancelled" is JobState CANCELLED
    sleep 10
    is JobState CANCELLED && is Restarts 0 || fail "it came back: $(field JobState "$job")"
    passed "cancelled, and not requeued"
}

# --- the other stages, with tiny models

models=$work/models
make_models() {
    if [ ! -d "$models" ]; then
        mkdir "$models"
        PYTHONPATH=tests:. "$PYTHON" -c "
import sys
from pathlib import Path
import tiny
folder = Path('$models')
tiny.models(folder)
tiny.tiles(folder / 'tiles', per_class=40)"
    fi
}
same_files() { # folder, another, pattern of names
    diff <(cd "$1" && find . -name "$3" -exec sha256sum {} + | sort -k 2) \
        <(cd "$2" && find . -name "$3" -exec sha256sum {} + | sort -k 2) ||
        fail "$1 and $2 differ"
    [ -n "$(find "$1" -name "$3" -print -quit)" ] || fail "there is no $3 in $1"
}
exists() { compgen -G "$1" > /dev/null; }

proof_sample() {
    make_models
    local options=(-r "$models/diffusion.ckpt" --classifier "$models/classifier.ckpt" -n 12 -c 25
        --batch_size 1 --device cpu)
    "$PYTHON" sample_diffusion.py "${options[@]}" --outdir "$work/alone" > /dev/null 2>> "$log"
    job=$(submit --ntasks-per-node=2 scripts/slurm/sample.sbatch "${options[@]}" \
        --outdir "$work/together")
    wait_for "images are there" exists "$work/together/ADI/00000[2-9].png"
    scancel --signal=USR1 "$job"
    wait_for "job $job is requeued" is Restarts 1
    [ ! -e "$work/together/manifest.csv" ] || fail "it was through before it was stopped"
    wait_for "job $job ends" completed
    same_files "$work/alone" "$work/together" "[0-9]*.png"
    job=$(submit --array=0-1 --ntasks-per-node=1 scripts/slurm/sample.sbatch "${options[@]}" \
        --outdir "$work/parts")
    job=$(submit --dependency="afterok:$job" --ntasks-per-node=1 scripts/slurm/sample.sbatch \
        "${options[@]}" --outdir "$work/parts")
    wait_for "job $job ends" completed
    grep -q "all 36 images are in" "$log" || fail "the array did not make all images"
    same_files "$work/alone" "$work/parts" "[0-9]*.png"
    [ "$(lines "$work/parts/manifest.csv")" = 37 ] || fail "the manifest is not of 36 images"
    passed "sampled by two tasks, stopped and requeued, and by an array: the images of one process"
}

proof_latents() {
    make_models
    local options=(-r "$models/autoencoder.ckpt" --data "$models/tiles" --labelled --views 4
        --augment d4 --shard_tiles 8 --batch_size 4 --num_workers 0 --device cpu)
    "$PYTHON" scripts/cache_latents.py "${options[@]}" --out "$work/cache" > /dev/null 2>> "$log"
    job=$(submit --nodes=2 --ntasks-per-node=1 scripts/slurm/latents.sbatch "${options[@]}" \
        --out "$work/cache2")
    wait_for "files are there" exists "$work/cache2/*"
    scancel --signal=USR1 "$job"
    wait_for "job $job is requeued" is Restarts 1
    wait_for "job $job ends" completed
    same_files "$work/cache" "$work/cache2" "*.safetensors"
    passed "encoded by two nodes, stopped and requeued: the files of one process"
}

proof_evaluate() {
    local options=(--data_path "$work/tiles" --output_dir train5 --logdir "$work/eval"
        --arch resnet10t --input-size 48 --epochs 40 --batch-size 8 --num_workers 0 --device cpu)
    local array
    array=$(submit --array=0-1 --ntasks-per-node=1 scripts/slurm/evaluate.sbatch "${options[@]}")
    job=${array}_1
    wait_for "seed 1 trains" exists "$work/eval/train5/seed1/*"
    scancel --signal=USR1 "$job"
    wait_for "$job is requeued" is Restarts 1
    wait_for "$job ends" completed
    job=${array}_0
    wait_for "$job ends" completed
    is Restarts 0 || fail "the other element was requeued, too"
    job=$(submit --ntasks-per-node=1 scripts/slurm/evaluate.sbatch "${options[@]}" --seeds 0 1)
    wait_for "job $job ends" completed
    "$PYTHON" -c "
import json
assert len(json.load(open('$work/eval/train5/summary.json'))['per_seed']) == 2" ||
        fail "the summary is not of both seeds"
    passed "one element of an array stopped and requeued, the other left alone, one summary"
}

proof_command() {
    job=$(submit scripts/slurm/command.sbatch scripts/index_corpus.py "$work/tiles/train" \
        --out "$work/train.parquet")
    wait_for "job $job ends" completed
    job=$(submit scripts/slurm/command.sbatch scripts/write_shards.py "$work/train.parquet" \
        --out "$work/shards" --size 100K)
    wait_for "job $job ends" completed
    exists "$work/shards/*.tar" || fail "no shards"
    job=$(submit scripts/slurm/command.sbatch scripts/index_corpus.py /nowhere --out x.parquet)
    wait_for "job $job fails" is JobState FAILED
    is ExitCode 2 && is Restarts 0 || fail "a mistake is status 2, and no reason to requeue"
    passed "index and shards; a mistake is not requeued"
}

for proof in $proofs; do
    log=$work/$proof.log began=$SECONDS
    "proof_$proof"
done
grep -oh "stopped by SIG.*" "$work"/*.log || true # not the progress bar on the same line
echo "all passed: $proofs ($SECONDS s)"
