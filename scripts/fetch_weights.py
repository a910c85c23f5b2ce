"""The published name of `histodiffusion fetch`."""

from ldm.cli import run_command
from ldm.commands.fetch import Options, main

if __name__ == "__main__":
    run_command(main, Options)
