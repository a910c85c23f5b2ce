"""The published name of `histodiffusion index`."""

from ldm.cli import run_command
from ldm.commands.index import Options, main

if __name__ == "__main__":
    run_command(main, Options)
