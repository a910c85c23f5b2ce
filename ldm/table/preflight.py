"""Every command of a plan, checked by its own options before the first one runs."""

import importlib
from collections.abc import Sequence

from ldm.errors import UserError
from ldm.stages import Stage


def check_commands(stages: Sequence[Stage]) -> None:
    """Parse all command lines, as the commands will.

    Raises:
        UserError: Options that a command does not have, or values that it does not take; all
            problems at once, each option once.
    """
    problems: dict[str, str] = {}
    for stage in stages:
        script, *words = stage.command
        message = _complaint(script, words)
        if message:
            problems.setdefault(message, stage.name)
    if problems:
        listed = "; ".join(f"{name}: {message}" for message, name in problems.items())
        raise UserError(listed)


def _complaint(script: str, words: Sequence[str]) -> str | None:
    """What a script says against these words, on one line."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        module.parse_arguments(list(words))
    except UserError as error:
        return f"{script}: {error}"
    return None
