"""Content of a model's files as one hash: weights wherever the folder's index says, config, and code where it runs."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptq_awq.storage.assets import cache_dir, file_sha256
from gptq_awq.storage.notes import note, noted

log = logging.getLogger(__name__)
TRUSTED_SECONDS = 7 * 86400.0
"""Time for which a file of unchanged inode, size and times is taken to hold the bytes that were hashed."""
RECENT_SECONDS = 2.0
"""Age below which a file's times may not show its next change."""


def folder_sha256(folder: Path, code: bool = False) -> str:
    """Hash of the weight files and config.json of a transformers folder, and of all that says where weights lie.

    It is the sha256 of sha256sum's output on these files, in the order of their names. With `code`, the folder's own
    Python files, which a trusted model runs, are among them.
    """
    digest = hashlib.sha256()
    for path in sorted({*_files(folder), *(folder.glob("*.py") if code else ())}):
        digest.update(f"{known_sha256(path)}  {os.path.relpath(path, folder)}\n".encode())
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """Hex sha256 of a large file's bytes, from the cache where nothing has touched the file since it was hashed.

    It is hashed again when its inode, size, time of change of its bytes or of its state differs, and in any case after
    `TRUSTED_SECONDS`.
    """
    path = path.resolve()
    status = path.stat()
    seen = [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory = cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    known = noted(memory)
    with suppress(KeyError, TypeError):
        if known["seen"] == seen and 0 <= time.time() - known["hashed"] < TRUSTED_SECONDS:
            return str(known["sha256"])
    started, sha256 = time.time(), file_sha256(path)
    if started - max(status.st_mtime, status.st_ctime) > RECENT_SECONDS:
        try:
            note(memory, {"seen": seen, "hashed": started, "sha256": sha256})
        except OSError as error:
            log.debug("the hash of %s is not kept: %s", path, error)
    return sha256


def _files(folder: Path) -> Iterator[Path]:
    """Files that decide on a folder's weights: config, tensors, an index and what it names, an adapter's config."""
    yield folder / "config.json"
    if (adapter := folder / "adapter_config.json").is_file():
        yield adapter
    for kind in ("safetensors", "bin"):
        indices = sorted(folder.glob(f"*.{kind}.index.json"))
        weights = {*folder.glob(f"*.{kind}"), *(path for index in indices for path in _named_in(index))}
        if weights:
            yield from indices
            yield from weights
            return


def _named_in(index: Path) -> Iterator[Path]:
    """Files that an index names; loading says what is wrong with a damaged one."""
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        for name in set(json.loads(index.read_text())["weight_map"].values()):
            if (path := index.parent / name).is_file():
                yield path
