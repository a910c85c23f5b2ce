"""The published name of `histodiffusion copies`."""

from ldm.cli import run_command
from ldm.commands.copies import Options, main

if __name__ == "__main__":
    run_command(main, Options)
