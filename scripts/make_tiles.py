"""The published name of `histodiffusion tiles`."""

from ldm.cli import run_command
from ldm.commands.tiles import Options, main

if __name__ == "__main__":
    run_command(main, Options)
