"""The published name of `histodiffusion sample`."""

from ldm.cli import run_command
from ldm.commands.sample import Options, main

if __name__ == "__main__":
    run_command(main, Options)
