"""The cache folder that runs share: list its entries and sizes, and delete them.

    python -m gptq_awq.cache list
    python -m gptq_awq.cache clear [KIND …] [--older DAYS]

The folder is `gptq_awq.storage.assets.cache_dir()`, or $GPTQ_AWQ_CACHE; runs, processes and nodes may share it.
Every entry is named by the hash of what it depends on, written whole, and checked when read; so deleting one costs time
and nothing else. After a run, the least recently used entries are deleted until `cache_gb` suffices (downloads, models
and the progress of unfinished runs don't count, and are only deleted by `clear`). Reading an entry is using it, and one
that a live run goes on reading is never deleted.
"""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from gptq_awq.cache.leftovers import clear_leftovers, leftovers
from gptq_awq.errors import UserError
from gptq_awq.runtime.commands import exit_code
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.pins import delete_unpinned

log = logging.getLogger(__name__)
SECONDS_PER_DAY = 86400
KINDS = {
    "tokens": "token ids of texts",
    "baselines": "full-precision scores: losses, hidden states, lm-eval answers",
    "curvatures": "output-side curvature of linears",
    "moments": "second moments and factors of full-precision inputs",
    "sensitivities": "loss from rounding each linear, for allocating bits",
    "progress": "finished blocks of runs that were interrupted",
    "layouts": "where llama.cpp's converter and mlx-lm put a model's tensors",
    "vocabularies": "how llama.cpp's files describe tokenizers, and texts that it tokenizes otherwise",
    "choices": "recipes that were chosen for a time budget",
    "runs": "locations of finished runs",
    "assets": "downloads: models and texts, checked by sha256",
    "models": "GGUF files as transformers folders",
    "hashes": "sha256 of models' files, by path, size and times",
    "engines": "environments of inference engines",
}
DISPENSABLE = ("tokens", "baselines", "curvatures", "moments", "sensitivities", "layouts", "vocabularies")
"""Kinds whose least recently used entries are deleted where they exceed `cache_gb`."""


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache, deleted as a whole."""

    kind: str
    path: Path
    size_bytes: int
    used: float
    """Time of the last read or write, in seconds since the epoch."""

    def delete(self) -> bool:
        """Delete the entry, unless a live run reads it: whether it is gone, by this process or another."""
        return delete_unpinned(self.path, self._delete)

    def _delete(self) -> None:
        with suppress(OSError):
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink()


def entries(kinds: Iterable[str] = tuple(KINDS), folder: Path | None = None) -> Iterator[Entry]:
    """Yield the cache's entries of the given kinds; hidden files are no entries."""
    for kind in kinds:
        parent = (folder or cache_dir()) / kind
        if parent.is_dir():
            yield from (_entry(kind, path) for path in sorted(parent.iterdir()) if not path.name.startswith("."))


def prune(limit_bytes: float, folder: Path | None = None) -> list[Entry]:
    """Delete the least recently used entries until the dispensable kinds take at most `limit_bytes`; returns them.

    Entries that a live run reads stay, whatever they take.
    """
    kept = sorted(entries(DISPENSABLE, folder), key=lambda entry: entry.used)
    excess, dropped = sum(entry.size_bytes for entry in kept) - limit_bytes, []
    for entry in kept:
        if excess <= 0:
            break
        if entry.delete():
            excess -= entry.size_bytes
            dropped.append(entry)
    if dropped:
        log.info("cache_gb: dropped %d entries, %.2f GB", len(dropped), sum(e.size_bytes for e in dropped) / 1e9)
    return dropped


def clear(kinds: Iterable[str], older_days: float = 0, folder: Path | None = None) -> list[Entry]:
    """Delete the entries of `kinds` unused for `older_days`, but for those that a live run reads, and return them.

    Raises:
        UserError: there is no such kind.
    """
    kinds = list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"cache clear {kind}: choose among {', '.join(KINDS)}")
    before = time.time() - older_days * SECONDS_PER_DAY
    return [entry for entry in entries(kinds, folder) if entry.used <= before and entry.delete()]


def _entry(kind: str, path: Path) -> Entry:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size, used = 0, 0.0
    for file in files:
        with suppress(OSError):
            status = file.stat()
            size, used = size + status.st_size, max(used, status.st_mtime)
    return Entry(kind, path, size, used)


def _listed() -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{cache_dir()}", title_justify="left")
    for name in ("kind", "entries", "size", "last used", ""):
        table.add_column(name, justify="right" if name in ("entries", "size") else "left")
    for kind, meaning in KINDS.items():
        found = list(entries([kind]))
        used = max((entry.used for entry in found), default=0)
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) if found else ""
        table.add_row(kind, str(len(found)), f"{sum(e.size_bytes for e in found) / 1e6:.1f} MB", day, meaning)
    found = [_entry("", path) for path in leftovers()]
    size = f"{sum(entry.size_bytes for entry in found) / 1e6:.1f} MB"
    table.add_row("", str(len(found)), size, "", "leftovers of killed processes; the next run or clear deletes them")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a mistake the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m gptq_awq.cache", description="What runs share on disk.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show kinds of entries, their numbers and sizes")
    clearing = commands.add_parser("clear", help="delete entries")
    clearing.add_argument("kinds", nargs="*", metavar="KIND", help=f"one of {', '.join(KINDS)}; default: {_default()}")
    clearing.add_argument("--older", type=float, default=0, metavar="DAYS", help="only entries unused for so long")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.command == "list":
        Console(width=None if sys.stdout.isatty() else 120).print(_listed())
    else:
        dropped = clear(options.kinds or _default().split(), options.older)
        clear_leftovers()
        sys.stdout.write(f"deleted {len(dropped)} entries, {sum(e.size_bytes for e in dropped) / 1e6:.1f} MB\n")


def _default() -> str:
    return " ".join([*DISPENSABLE, "progress", "runs"])
