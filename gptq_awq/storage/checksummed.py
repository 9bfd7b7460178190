"""Tensors and JSON facts in one safetensors file that carries its own checksum.

Reading gives the content that was written, or an error: a truncated, corrupted or foreign file is never used.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_awq.storage.atomic import locked, replacing

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """Raised for a file whose content is not what was written; the message names the defect."""


@dataclass(frozen=True)
class ChecksummedFile:
    """The content of a checksummed file: named tensors and JSON facts."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Hex sha256 of the content: facts, and names, dtypes, shapes and bytes of the tensors."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name, x in sorted(self.tensors.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(tensor_bytes(x))
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write the content to `path`, whole or not at all. Raises OSError (disk full, read-only)."""
        tensors: dict[str, Tensor] = {}
        for name, x in self.tensors.items():
            x = x.detach().cpu().contiguous()
            shared = any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in tensors.values())
            tensors[name] = x.clone() if shared else x  # safetensors refuses tensors that share memory
        metadata = {"facts": json.dumps(self.facts), "sha256": self.sha256()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.touch()
            mode = scratch.stat().st_mode  # as the umask says; safetensors makes files that only their owner can read
            try:
                save_file(tensors, scratch, metadata)
                scratch.chmod(mode)
            except SafetensorError as error:  # raised where the disk is full
                raise OSError(f"{path}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> "ChecksummedFile":
        """Read the content of `path` and verify its checksum.

        Raises:
            FileNotFoundError: no such file.
            DamagedError: the content is not what was written.
        """
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
                raise DamagedError("it is no regular file")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            content = cls(tensors, json.loads(metadata["facts"]))
            if not isinstance(content.facts, dict):
                raise DamagedError("its facts are no map")
            if metadata["sha256"] != content.sha256():
                raise DamagedError("checksum mismatch")
        except (FileNotFoundError, DamagedError):
            raise
        except Exception as error:  # safetensors raises its own types; whatever it is, the file is not to be used
            raise DamagedError(str(error) or repr(error)) from error
        return content


def read(path: Path, what: str) -> ChecksummedFile | None:
    """Read a cached file; None where there is none, or, with a warning that calls it `what`, where it is damaged.

    Its time stamp is renewed: the cache deletes the least recently used entries.
    """
    try:
        content = ChecksummedFile.read(path)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        log.warning("the cached %s %s is damaged (%s): computing it anew", what, path, error)
        return None
    with suppress(OSError):
        path.touch()
    log.debug("%s read from %s", what, path)
    return content


def once(
    path: Path,
    what: str,
    compute: Callable[[], ChecksummedFile],
    valid: Callable[[ChecksummedFile], bool] | None = None,
) -> ChecksummedFile:
    """Read the cached file `path`, or compute its content and write it; of several processes only one computes.

    Args:
        path: the cached file.
        what: name of the content, for log lines.
        compute: computes the content.
        valid: whether a content that was read has the expected shape; None: always.

    Where the file can't be written (disk full), the computed content is returned and a warning logged.
    """

    def kept() -> ChecksummedFile | None:
        content = read(path, what)
        if content is not None and valid is not None and not valid(content):
            log.warning("the cached %s %s is damaged (not of this shape): computing it anew", what, path)
            return None
        return content

    content = kept()
    if content is not None:
        return content
    with locked(lock_path(path), lambda: log.info("another process computes the %s: waiting for it", what)):
        content = kept() if path.exists() else None
        if content is None:
            content = compute()
            try:
                content.write(path)
            except OSError as error:
                log.warning("the %s is not kept for later runs: %s", what, error)
    return content


def lock_path(path: Path) -> Path:
    """Path of the lock file that guards `path`."""
    return path.parent / ".locks" / path.name


def tensor_bytes(x: Tensor) -> memoryview:
    """Bytes of a tensor in row-major order, for hashing."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
