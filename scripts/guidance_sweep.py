"""The published name of `histodiffusion sweep`."""

from ldm.cli import run_command
from ldm.commands.sweep import Options, main

if __name__ == "__main__":
    run_command(main, Options)
