"""What every command has in common: argument types, one-line errors, exit statuses.

Imports nothing heavy, so that `--help` answers at once.
"""

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldm.errors import Stopped, UserError

TRACEBACK_VARIABLE = "HISTO_TRACEBACK"
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line (no usage block) with exit status 2."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def boolean(text: str) -> bool:
    """Parse `True`/`False` as the published scripts take them (`--anneal_lr True`)."""
    value = text.strip().lower()
    if value in ("true", "yes", "y", "1", "t"):
        return True
    if value in ("false", "no", "n", "0", "f"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable:
    """An argparse type for an int or float within [low, high]."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        # Written so that nan, for which every comparison is false, is refused too.
        inside = (low is None or value >= low) and (high is None or value <= high)
        if not inside or value != value:
            bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
            raise argparse.ArgumentTypeError(f"{text} must be in {bounds}")
        return value

    return parse


def existing_path(text: str | os.PathLike, what: str, kind: str = "any") -> Path:
    """The path, or a UserError that names it when it is missing or of the wrong kind.

    Args:
        what: How the message calls it, for example `--data_dir`.
        kind: "file", "dir" or "any".
    """
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"{what}: {path} does not exist; check the path")
    if kind == "file" and not path.is_file():
        raise UserError(f"{what}: {path} is a folder; give a file")
    if kind == "dir" and not path.is_dir():
        raise UserError(f"{what}: {path} is a file; give a folder")
    return path


def _one_line(error: BaseException) -> str:
    """The message on one line, freed of the worker traceback that a DataLoader puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        return lines[-1].split("UserError: ", 1)[-1]
    return " ".join(lines)


def _nobody_reads() -> bool:
    """Whether the reader of the output has left, as `head` does; what is left of it is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False  # a pipe of another process broke
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point: a user's mistake or a file-system error is one line and exit status 2.

    Set HISTO_TRACEBACK=1 to see where such an error came from.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = STOPPED
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + 13)  # as SIGPIPE ends a command
        if isinstance(error, OSError) and error.strerror:
            where = f": {error.filename}" if error.filename else ""
            message = f"{error.strerror}{where}"
        else:
            message = _one_line(error)
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
