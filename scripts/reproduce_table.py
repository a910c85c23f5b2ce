"""The published name of `histodiffusion table`."""

from ldm.cli import run_command
from ldm.commands.table import Options, main

if __name__ == "__main__":
    run_command(main, Options)
