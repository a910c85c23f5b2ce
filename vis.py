"""The published name of `histodiffusion features`."""

from ldm.cli import run_command
from ldm.commands.features import Options, main

if __name__ == "__main__":
    run_command(main, Options)
