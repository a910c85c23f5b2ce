"""The published name of `histodiffusion export`."""

from ldm.cli import run_command
from ldm.commands.export import Options, main

if __name__ == "__main__":
    run_command(main, Options)
