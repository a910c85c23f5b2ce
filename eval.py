"""The published name of `histodiffusion evaluate`."""

from ldm.cli import run_command
from ldm.commands.evaluate import Options, main

if __name__ == "__main__":
    run_command(main, Options)
