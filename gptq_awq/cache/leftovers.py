"""Leftovers of killed processes in the cache: scratch files and folders whose writers are dead."""

import logging
from collections.abc import Iterator
from pathlib import Path

from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.atomic import leftover, remove_all

log = logging.getLogger(__name__)
DEEPEST = 3
"""Levels of folders below the cache in which scratch files are written: KIND/HASH/activations-0001."""


def leftovers(folder: Path | None = None) -> Iterator[Path]:
    """Yield scratch files and folders of dead processes in the cache, or in `folder` instead."""
    root = folder or cache_dir()
    for depth in range(1, DEEPEST + 1):
        yield from filter(leftover, root.glob("/".join([*["[!.]*"] * depth, ".*"])))


def clear_leftovers(folder: Path | None = None) -> list[Path]:
    """Delete the leftovers, and return them."""
    gone = remove_all(list(leftovers(folder)))
    if gone:
        log.info("deleted %d scratch files that killed processes had left in the cache", len(gone))
    return gone
