"""The commands, a module each: its dataclass `Options`, and `main`, which runs it.

`histodiffusion VERB` and `python -m ldm.commands VERB` are the same; the scripts of a checkout are
further names. Imports nothing heavy before a command line has been parsed.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import ModuleType
from typing import NoReturn

from ldm.cli import description, nearest, run_command
from ldm.errors import UserError

# In the order of use.
VERBS = (
    *("demo", "tiles", "index", "shards", "subset", "fetch"),
    *("train", "cache", "classify", "sweep", "sample", "copies", "features", "select"),
    *("evaluate", "baselines", "fidelity", "table", "import", "export"),
)


def load(verb: str) -> ModuleType:
    """The module of a command, by its name among `VERBS`."""
    return import_module(f"{__name__}.{verb}{'_' * iskeyword(verb)}")


def overview() -> str:
    """What `histodiffusion --help` prints: a line for each command."""
    lines = ["usage: histodiffusion COMMAND [options]", ""]
    for verb in VERBS:
        lines.append(f"  {verb:10} {description(load(verb).Options).splitlines()[0]}")
    return "\n".join([*lines, "", "The options of a command: histodiffusion COMMAND --help"])


def start(words: Sequence[str]) -> None:
    """Answer a command line that begins with no command."""
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"unknown command {words[0]}{nearest(words[0], VERBS)}")
    print(overview())


def main() -> NoReturn:
    """Run `histodiffusion` or `python -m ldm.commands`."""
    words = sys.argv[1:]
    if not words or words[0] not in VERBS:
        run_command(lambda: start(words))
    command = load(words[0])
    run_command(lambda: command.main(words[1:]), command.Options)
