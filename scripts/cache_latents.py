"""The published name of `histodiffusion cache`."""

from ldm.cli import run_command
from ldm.commands.cache import Options, main

if __name__ == "__main__":
    run_command(main, Options)
