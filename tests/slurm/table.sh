#!/bin/bash
# Proof on a real SLURM that the jobs of a table run as arrays, wait for one another, stop at their
# time limit and come back, and that a failure stops only what needs it.
#
#   tests/slurm/table.sh        as root on Debian or Ubuntu; three minutes or so
#
# Nothing is left running; files are in a new folder below /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
. tests/slurm/cluster.sh
trap stop_cluster EXIT
start_cluster

"$PYTHON" tests/slurm/table.py "$work"
