"""Being written."""

from typing import Any


def page(*_: Any) -> str:
    """Nothing yet."""
    return ""
