"""The published name of `histodiffusion import`."""

from ldm.cli import run_command
from ldm.commands.import_ import Options, main

if __name__ == "__main__":
    run_command(main, Options)
