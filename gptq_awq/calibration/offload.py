"""Spilled tensors: hidden states kept in files between blocks, where a long calibration does not fit into memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_awq.storage.atomic import replacing
from gptq_awq.storage.checksummed import tensor_bytes


@dataclass(frozen=True)
class Spilled:
    """A tensor in a file of its own, which is mapped into memory when it is read.

    Attributes:
        path: the file, of the tensor's bytes alone.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        device: device that `read` puts the tensor on.
    """

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, path: Path) -> "Spilled":
        """Write a tensor to `path`; tensors read from an earlier file there stay valid. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch, scratch.open("wb") as file:
            file.write(tensor_bytes(x))
        return cls(path, x.shape, x.dtype, x.device)

    def read(self) -> Tensor:
        """The tensor, whose pages are read from the file as they are touched and are freed with the tensor."""
        count = self.shape.numel() * self.dtype.itemsize
        raw = torch.from_file(str(self.path), shared=False, size=count, dtype=torch.uint8)
        return raw.view(self.dtype).view(self.shape).to(self.device)
