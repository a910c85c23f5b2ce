"""The published name of `histodiffusion select`."""

from ldm.cli import run_command
from ldm.commands.select import Options, main

if __name__ == "__main__":
    run_command(main, Options)
