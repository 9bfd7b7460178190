"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake the user can fix: one line that names the option to change.

    `run.py` prints the message alone (no traceback) and exits with code 2. Names and values that others chose may hold
    characters that no terminal takes, which are shown escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))
