"""Reading files that others made: regular files only, up to a size, and JSON or YAML that can't exhaust memory.

A file of a stranger may be a pipe that never ends, larger than memory, or nested deeper than Python's stack.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

ROW_BYTES = 16_000_000
"""Largest results.json or failed.json that is read."""
LEDGER_BYTES = 1_000_000_000
"""Largest ledger.jsonl that is read: half a million rows of 2 KB."""
RECORD_BYTES = 256_000_000
"""Largest verification.json that is read."""
CONFIG_BYTES = 1_000_000
"""Largest config.yaml that is read: one of a run has some 5 KB."""


def read_bytes(path: Path | str, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        OSError: it can't be opened.
        ValueError: it is no regular file, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        content = file.read(most + 1) if found.st_size <= most else b""
        if max(len(content), found.st_size) > most:
            raise ValueError(f"it has more than {most / 1e6:g} MB")
        return content


def read_json(path: Path | str, most: int) -> Any:
    """Read a JSON file of at most `most` bytes. Raises OSError, or ValueError for anything that is wrong with it."""
    try:
        return json.loads(read_bytes(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path | str, most: int) -> Any:
    """Read a YAML file of at most `most` bytes, of plain values and without aliases, a few of which can stand for
    billions of values. Raises OSError, or ValueError for anything that is wrong with it.
    """
    try:
        return yaml.load(read_bytes(path, most), Loader=_PlainLoader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose the next node. Raises YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which no config of a run has")
        return super().compose_node(parent, index)
