"""Exceptions that commands answer with one line: a user's mistake, and a stop on request."""

from collections.abc import Mapping


class UserError(ValueError):
    """Something a user can set is wrong.

    The message is a single line: the setting or file, its value, what is allowed and the remedy.
    Every function that takes what a user gave may raise it; a docstring names it where its reason
    is not seen in the function. Commands print that line and exit with status 2 (see
    `ldm.cli.run_command`). Only they know what their options are called: a text names a setting in
    backquotes, which they print as its option.

    Args:
        key: Name of the setting, which then begins the message. A command shows it as the name of
            its option.
    """

    def __init__(self, message: str = "", key: str | None = None):
        super().__init__(f"{key}: {message}" if key else message)
        self.reason, self.key = message, key


class Problems(UserError):
    """Several settings are wrong: all of them, in one line here and a line each in a command.

    Args:
        found: Name or dotted path of a setting, and what is wrong with it and what to do.
        subject: What has these settings; the message begins with it.
    """

    def __init__(self, found: Mapping[str, str], subject: str | None = None):
        self.found = dict(found)
        self.lines = [f"{name}: {text}" if text else name for name, text in found.items()]
        message = " | ".join(self.lines)
        if len(self.lines) > 1:
            message = f"{len(self.lines)} problems: {message}"
        super().__init__(message, subject)

    def __reduce__(self):
        return type(self), (self.found, self.key)


def require_whole(key: str, value: object, least: int) -> None:
    """Check a setting that is a whole number; UserError if it is another value or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value!r} must be a whole number, at least {least}")


class NoRoom(UserError):
    """A disk has no room for what is to be written; the same command goes on where there is some.

    All of a file that was begun is gone, and what was there before it is untouched.
    """


class Stopped(Exception):
    """A run was asked to stop and can go on later: one line for the user and exit status 75."""
