"""The published name of scripts/vis.py: features, centroids and a picture."""

from ldm.cli import run_command
from scripts.vis import Options, main

if __name__ == "__main__":
    run_command(main, Options)
