"""The published name of `histodiffusion baselines`."""

from ldm.cli import run_command
from ldm.commands.baselines import Options, main

if __name__ == "__main__":
    run_command(main, Options)
