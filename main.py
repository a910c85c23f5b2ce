"""The published name of `histodiffusion train`."""

from ldm.cli import run_command
from ldm.commands.train import Options, main

if __name__ == "__main__":
    run_command(main, Options)
