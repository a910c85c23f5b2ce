"""The published name of scripts/distance.py: the selection of synthetic tiles."""

from ldm.cli import run_command
from scripts.distance import Options, main

if __name__ == "__main__":
    run_command(main, Options)
