"""Publishing with a checkpoint: names of files and folders of a run, never where they lie on a machine."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

PRIVATE = ("host",)
"""Keys of a results row that name a machine."""
_ROOT = r"(?:file:/{2,3}|~[\w-]*/|/|[A-Za-z]:[\\/]|\\\\)"
_WHOLE = re.compile(rf"{_ROOT}[^\n]*")
_END = r"\s\"'`,;:()\[\]{}<>|="
_INSIDE = re.compile(rf"(?<![\w.:/\\~-]){_ROOT}(?:[^{_END}]| (?=[^{_END}/\\]+[/\\]))+")
"""A path inside of a sentence: it follows neither a word nor a colon or slash, as those of addresses do. A space
belongs to it where a slash comes in the next word."""


def names_only(value: Any) -> Any:
    """Replace every absolute path in a JSON value by its last part, and leave out names of machines.

    A text that is a path as a whole, spaces included, is replaced wherever else in the value it stands.
    """
    paths = sorted({text for text in _texts(value) if _WHOLE.fullmatch(text) and _name(text)}, key=len, reverse=True)
    return _public(value, paths)


def _public(value: Any, paths: list[str]) -> Any:
    if isinstance(value, str):
        for path in paths:
            value = value.replace(path, _name(path))
        return _INSIDE.sub(lambda found: _name(found[0]) or found[0], value)
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in PRIVATE}
        return {_public(key, paths): _public(item, paths) for key, item in kept.items()}
    return [_public(item, paths) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    return [text for item in items for text in _texts(item)]


def _name(path: str) -> str:
    """Last part of a path of either kind of system; "" where it has none."""
    windows = "\\" in path or re.match("[A-Za-z]:", path)
    return (PureWindowsPath(path) if windows else PurePosixPath(path.removeprefix("file://"))).name
