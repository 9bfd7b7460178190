"""Compilation of loops for all threads, kept on disk until any file of this folder changes.

numba keeps what it compiled under the hash of the file that the function stands in. Loops here call those of other
files, which are compiled into them: so everything is kept in a folder named by all files' hash.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import platformdirs

HERE = Path(__file__).parent


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a loop when it is first called; later processes read it from disk, where a folder can be written to."""
    folder = kept_in()
    user, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder or "")  # pyright: ignore
    try:
        return numba.njit(parallel=True, cache=folder is not None)(function)
    finally:
        numba.config.CACHE_DIR = user  # pyright: ignore


@cache
def kept_in() -> Path | None:
    """Return the folder of what is compiled from these sources: the first that can be written to, or None.

    The choices are numba's own: NUMBA_CACHE_DIR, beside the sources, and the user's cache. Beside the sources, what
    older ones left is deleted.
    """
    name, beside = f"gptq_awq-{source_hash()}", HERE / "__pycache__"
    given = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []  # pyright: ignore
    for parent in [*given, beside, Path(platformdirs.user_cache_dir("numba"))]:
        if _writable(parent / name):
            for old in (old for old in beside.glob("gptq_awq-*") if old.name != name):
                shutil.rmtree(old, ignore_errors=True)
            return parent / name
    return None


def source_hash() -> str:
    """Return a name for the sources in this folder: eight bytes of their hash, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:16]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
