"""The published name of `histodiffusion demo`."""

from ldm.cli import run_command
from ldm.commands.demo import Options, main

if __name__ == "__main__":
    run_command(main, Options)
