"""The published name of `histodiffusion subset`."""

from ldm.cli import run_command
from ldm.commands.subset import Options, main

if __name__ == "__main__":
    run_command(main, Options)
