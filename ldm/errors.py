"""Exceptions that commands answer with one line: a user's mistake, and a stop on request."""


class UserError(ValueError):
    """Something a user can set is wrong.

    The message is a single line: the setting or file, its value, what is allowed and the remedy.
    Commands print that line and exit with status 2 (see `ldm.cli.run_command`).
    """


class Stopped(Exception):
    """A run was asked to stop and can go on later: one line for the user and exit status 75."""
