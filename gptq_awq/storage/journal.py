"""A journal: the finished blocks of a computation on disk, so that it goes on after a crash where it was.

One sealed file per block, and one for each batch that enters the next block:

    activations-0004/… are written, then block-0004, then activations-0003 is deleted.

So at any moment, block files 0…n-1 and the folder activations-(n-1) are a consistent state of n finished blocks.
Several processes may each keep some batches, as long as all are kept before one of them appends the block. Every file carries
the journal's key, the hash of all that the computation depends on; files that carry another are foreign.
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
    """Finished blocks in `folder`, of the computation whose content hash is `key`."""

    folder: Path
    key: str

    def keep_batch(self, index: int, batch: int, states: Sequence[Tensor]) -> None:
        """What one batch takes from block `index` into the next. On disk when this returns. Raises OSError."""
        tensors = {f"{i}": state for i, state in enumerate(states)}
        ChecksummedFile(tensors, {"key": self.key}).write(self._batch(index, batch))

    def append(self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Block `index` is finished, and all its batches kept. On disk when this returns. Raises OSError."""
        ChecksummedFile(tensors, {"key": self.key, "content": facts}).write(self._block(index))
        for folder in self.folder.glob("activations-*"):
            if folder.name < self._activations(index).name:  # of later blocks there may be some already
                shutil.rmtree(folder, ignore_errors=True)

    def count(self) -> int:
        """How many leading blocks are there, not yet looked into."""
        index = 0
        while self._block(index).exists():
            index += 1
        return index

    def block(self, index: int) -> ChecksummedFile:
        """Tensors and facts of one finished block. Raises FileNotFoundError, DamagedError."""
        content = self._read(self._block(index))
        return ChecksummedFile(content.tensors, content.facts["content"])

    def batch(self, index: int, batch: int) -> list[Tensor]:
        """What one batch takes from block `index` into the next. Raises FileNotFoundError, DamagedError."""
        tensors = self._read(self._batch(index, batch)).tensors
        return [tensors[f"{i}"] for i in range(len(tensors))]

    def drop_activations(self) -> None:
        """Forget the activations: all blocks are finished."""
        for folder in self.folder.glob("activations-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Forget everything."""
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
        return content
