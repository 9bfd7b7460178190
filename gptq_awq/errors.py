"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake the user can fix: one line that names the option to change.

    `run.py` prints the message alone (no traceback) and exits with code 2.
    """
