"""The published name of `histodiffusion classify`."""

from ldm.cli import run_command
from ldm.commands.classify import Options, main

if __name__ == "__main__":
    run_command(main, Options)
