"""The published name of `histodiffusion fidelity`."""

from ldm.cli import run_command
from ldm.commands.fidelity import Options, main

if __name__ == "__main__":
    run_command(main, Options)
