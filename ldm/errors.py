"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something a user can set is wrong.

    The message is a single line: the setting or file, its value, what is allowed and the remedy.
    Commands print that line and exit with status 2 (see `ldm.cli.run_command`).
    """
