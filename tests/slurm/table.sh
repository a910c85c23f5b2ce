#!/bin/bash
# Proof on a real SLURM that the jobs of a table wait for one another, stop at their time limit and
# come back, and that a failure stops only what needs it.
#
#   tests/slurm/table.sh        as root on Debian or Ubuntu; five minutes or so
#
# Nothing is left running; files are in a new folder below /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
. tests/slurm/cluster.sh
trap stop_cluster EXIT
start_cluster

# Snakemake starts srun without the variable SLURM_CONF: it has to find the file by itself.
link=/etc/slurm/slurm.conf
if [ -e $link ] || [ -L $link ]; then echo "$link exists; remove it" >&2; exit 2; fi
trap 'rm -f $link; stop_cluster' EXIT
ln -s "$SLURM_CONF" $link

"$PYTHON" tests/slurm/table.py "$work" || { tail -n 40 "$work/jobs/snakemake.log" >&2; exit 1; }
