"""The commands, a module each: its dataclass `Options`, and `main`, which runs it.

`histodiffusion VERB` and `python -m ldm.commands VERB` are the same; the scripts of a checkout are
further names. Imports nothing heavy before a command line has been parsed.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import ModuleType
from typing import NoReturn

from ldm import __version__
from ldm.cli import COMMANDS, PROGRAM, description, make_parser, nearest, run_command
from ldm.errors import UserError

COMPLETION = "--print-completion"


def load(verb: str) -> ModuleType:
    """The module of a command, by its name among `COMMANDS`."""
    return import_module(f"{__name__}.{verb}{'_' * iskeyword(verb)}")


def overview() -> str:
    """What `histodiffusion --help` prints: a line for each command."""
    lines = ["usage: histodiffusion COMMAND [options]", ""]
    for verb in COMMANDS:
        lines.append(f"  {verb:10} {description(load(verb).Options).splitlines()[0]}")
    more = [
        "The options of a command: histodiffusion COMMAND --help",
        f"Completion in a shell: histodiffusion {COMPLETION} bash|zsh",
    ]
    return "\n".join([*lines, "", *more])


def completion(shell: str) -> str:
    """The script by which a shell completes commands, options, their choices and files."""
    import shtab

    parser = argparse.ArgumentParser(PROGRAM)
    verbs = parser.add_subparsers()
    for verb in COMMANDS:
        own = make_parser(load(verb).Options)
        for action in own._actions:
            words = str(action.metavar).split("|")
            if len(words) > 1 and words[0].islower():
                action.choices = words
            elif action.nargs != 0:
                action.complete = shtab.FILE
        verbs.add_parser(verb, parents=[own], add_help=False, help=own.description)
    return shtab.complete(parser, shell)


def start(words: Sequence[str]) -> None:
    """Answer a command line that begins with no command."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
    elif words[0] == "--version":
        print(PROGRAM, __version__)
    elif words[0] == COMPLETION:
        if words[1:] not in (["bash"], ["zsh"]):
            raise UserError(f"{COMPLETION}: give bash or zsh")
        print(completion(words[1]))
    else:
        raise UserError(f"unknown command {words[0]}{nearest(words[0], COMMANDS)}")


def main() -> NoReturn:
    """Run `histodiffusion` or `python -m ldm.commands`."""
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        run_command(lambda: start(words))
    command = load(words[0])
    run_command(lambda: command.main(words[1:]), command.Options)
