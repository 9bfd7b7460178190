"""A journal: the finished blocks of a computation on disk, so that it resumes after a crash.

One checksummed file per block, and one per batch of activations that enters the next block, written in this order:

    activations-0004/…, then block-0004, then activations-0003 is deleted.

So at any moment, block files 0…n-1 and the folder activations-(n-1) are a consistent state of n finished blocks.
Several processes may each write some batches, as long as all are written before one of them appends the block. Every
file carries the journal's key, the hash of all that the computation depends on; files with another key are refused.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_awq.storage.checksummed import ChecksummedFile, DamagedError


@dataclass(frozen=True)
class Journal:
    """The finished blocks, in `folder`, of the computation identified by the hash `key`."""

    folder: Path
    key: str

    def keep_batch(self, index: int, batch: int, states: Sequence[Tensor]) -> None:
        """Write the outputs of block `index` for one batch; on disk when this returns. Raises OSError."""
        tensors = {f"{i}": state for i, state in enumerate(states)}
        ChecksummedFile(tensors, {"key": self.key}).write(self._batch(index, batch))

    def append(self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the finished block `index`, whose batches are all kept; on disk when this returns. Raises OSError."""
        ChecksummedFile(tensors, {"key": self.key, "content": facts}).write(self._block(index))
        for folder in self.folder.glob("activations-*"):
            if folder.name < self._activations(index).name:  # later ones may exist already
                shutil.rmtree(folder, ignore_errors=True)

    def count(self) -> int:
        """Number of leading blocks that have a file; their contents are not checked."""
        index = 0
        while self._block(index).exists():
            index += 1
        return index

    def block(self, index: int) -> ChecksummedFile:
        """Read tensors and facts of one finished block. Raises FileNotFoundError, DamagedError."""
        content = self._read(self._block(index))
        if not isinstance(content.facts.get("content"), dict):
            raise DamagedError("it is no block of a journal")
        return ChecksummedFile(content.tensors, content.facts["content"])

    def batch(self, index: int, batch: int) -> list[Tensor]:
        """Read the outputs of block `index` for one batch. Raises FileNotFoundError, DamagedError."""
        tensors = self._read(self._batch(index, batch)).tensors
        if tensors.keys() != {f"{i}" for i in range(len(tensors))}:
            raise DamagedError("it is no batch of a journal")
        return [tensors[f"{i}"] for i in range(len(tensors))]

    def drop_activations(self) -> None:
        """Delete the activations, which no block needs once all are finished."""
        for folder in self.folder.glob("activations-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete the journal."""
        with suppress(OSError):
            shutil.rmtree(self.folder)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def _activations(self, index: int) -> Path:
        return self.folder / f"activations-{index:04d}"

    def _batch(self, index: int, batch: int) -> Path:
        return self._activations(index) / f"{batch:06d}.safetensors"

    def _read(self, path: Path) -> ChecksummedFile:
        content = ChecksummedFile.read(path)
        if content.facts.get("key") != self.key:
            raise DamagedError("it belongs to another computation, or to another machine or number of threads")
        with suppress(OSError):  # the cache deletes what was not used for longest
            path.touch()
        return content
