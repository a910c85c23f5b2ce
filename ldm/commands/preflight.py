"""Every command of a plan, checked by its own options before the first one runs."""

import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from ldm.cli import parse
from ldm.errors import UserError
from ldm.experiment.jobs import ROOT, Job


def check_commands(jobs: Sequence[Job]) -> None:
    """Parse all command lines, as the commands will.

    Raises:
        UserError: Options that a command does not have, or values that it does not take; all
            problems at once, each option once.
    """
    problems: dict[str, str] = {}
    for job in jobs:
        script, *words = job.command
        try:
            parse(_load(script).Options, words)
        except UserError as error:
            problems.setdefault(f"{script}: {error}", job.name)
    if problems:
        raise UserError("; ".join(f"{name}: {message}" for message, name in problems.items()))


@cache
def _load(script: str) -> ModuleType:
    """The module of a script of the checkout, which need not be on the import path."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    # The dataclass of the options looks its own module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
