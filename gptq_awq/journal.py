"""A journal: the finished blocks of a computation on disk, so that it goes on after a crash where it was.

One sealed file per block, and one with the stream that enters the next block:

    stream-0004 is written, then block-0004, then stream-0003 is deleted.

So at any moment, block files 0…n-1 and stream-(n-1) are a consistent state of n finished blocks. Every file carries the
journal's key, the hash of all that the computation depends on; files that carry another are foreign.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_awq.sealed import DamagedError, Sealed


@dataclass(frozen=True)
class Journal:
    """Finished blocks in `folder`, of the computation whose content hash is `key`."""

    folder: Path
    key: str

    def append(
        self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], stream: Sequence[Tensor] = ()
    ) -> None:
        """Block `index` is finished; `stream` enters the next one. On disk when this returns. Raises OSError."""
        if stream:
            states = {f"{i:06d}": hidden for i, hidden in enumerate(stream)}
            Sealed(states, {"key": self.key}).write(self._stream(index))
        Sealed(tensors, {"key": self.key, "content": facts}).write(self._block(index))
        self._stream(index - 1).unlink(missing_ok=True)

    def count(self) -> int:
        """How many leading blocks are there, not yet looked into."""
        index = 0
        while self._block(index).exists():
            index += 1
        return index

    def block(self, index: int) -> Sealed:
        """Tensors and facts of one finished block. Raises FileNotFoundError, DamagedError."""
        content = self._read(self._block(index))
        return Sealed(content.tensors, content.facts["content"])

    def stream(self, index: int) -> list[Tensor]:
        """What enters block `index` + 1. Raises FileNotFoundError, DamagedError."""
        content = self._read(self._stream(index))
        return [content.tensors[name] for name in sorted(content.tensors)]

    def drop_streams(self) -> None:
        """Forget the streams: all blocks are finished."""
        for path in self.folder.glob("stream-*"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        with suppress(OSError):
            shutil.rmtree(self.folder)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def _stream(self, index: int) -> Path:
        return self.folder / f"stream-{index:04d}.safetensors"

    def _read(self, path: Path) -> Sealed:
        content = Sealed.read(path)
        if content.facts.get("key") != self.key:
            raise DamagedError("it belongs to another computation, or to another machine or number of threads")
        return content
