"""The published name of `histodiffusion shards`."""

from ldm.cli import run_command
from ldm.commands.shards import Options, main

if __name__ == "__main__":
    run_command(main, Options)
