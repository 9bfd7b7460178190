"""Tensors that lie in files: what a long calibration carries from block to block, where memory is short of it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_awq.storage.atomic import replacing
from gptq_awq.storage.checksummed import tensor_bytes


@dataclass(frozen=True)
class Spilled:
    """A tensor in a file of its own, which is mapped while someone reads it."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, path: Path) -> "Spilled":
        """Write it. Whoever reads what was there before keeps that. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch, scratch.open("wb") as file:
            file.write(tensor_bytes(x))
        return cls(path, x.shape, x.dtype, x.device)

    def read(self) -> Tensor:
        """The tensor. Its pages come from the file as they are touched, and go with it."""
        count = self.shape.numel() * self.dtype.itemsize
        raw = torch.from_file(str(self.path), shared=False, size=count, dtype=torch.uint8)
        return raw.view(self.dtype).view(self.shape).to(self.device)
