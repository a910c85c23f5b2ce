"""Every command of a plan, checked by its own options before the first one runs."""

from collections.abc import Sequence

from ldm.cli import parse
from ldm.commands import load
from ldm.errors import UserError
from ldm.experiment.jobs import Job


def check_commands(jobs: Sequence[Job]) -> None:
    """Parse all command lines, as the commands will; all problems are one UserError, each once."""
    problems: dict[str, str] = {}
    for job in jobs:
        verb, *words = job.command
        try:
            parse(load(verb).Options, words)
        except UserError as error:
            problems.setdefault(f"{verb}: {error}", job.name)
    if problems:
        raise UserError("; ".join(f"{name}: {message}" for message, name in problems.items()))
