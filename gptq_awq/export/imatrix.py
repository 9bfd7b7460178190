"""llama.cpp's importance matrices: mean squares of what enters each linear, in a GGUF file or in the format before it.

    NAME.in_sum2   (experts, in)  float32   sum over tokens of x²
    NAME.counts    (experts, 1)   float32   number of tokens

The older format is binary, little-endian: the number of entries as int32, and per entry the length of its name, the
name, the number n of calls, the number of values, and the values, n times the mean squares, as float32.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.calibration.input_statistics import InputStatistics
from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source
from gptq_awq.export.config import write_config
from gptq_awq.export.gguf_layout import modules_by_tensor
from gptq_awq.runtime.options import checked_dataclass
from gptq_awq.storage.headers import check_gguf

Squares = Float[np.ndarray, "experts in"]
SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK = 512
"""Tokens that count as one chunk, which llama-quantize prints."""
LIMIT = 2**31
"""Most bytes of a file in the older format, whose claims nothing else bounds."""


@checked_dataclass
class ImatrixFormat:
    """Export to a folder with `imatrix.gguf`, which llama-quantize takes; it holds no weights.

    Attributes:
        calibrates: the run gathers what enters the full-precision model's linears.
        holds_weights: whether the folder is a model.
    """

    name: str = "imatrix"
    calibrates: bool = True
    holds_weights: bool = False

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Accept every grid, as no weights are stored."""

    def check_model(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> list[str]:  # noqa: ARG002
        """Raise UserError for an architecture that llama.cpp's converter doesn't know."""
        modules_by_tensor(model)
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Write imatrix.gguf and the model's config.json."""
        assert source.inputs is not None  # `calibrates`
        inputs, tensors = source.inputs, modules_by_tensor(source.model)
        entries = {
            f"{tensor}.weight": [inputs[module] for module in modules]
            for tensor, modules in tensors.items()
            if all(module in inputs for module in modules)
        }
        write_imatrix(folder / "imatrix.gguf", entries)
        write_config(source.model, folder, source.model.dtype, None)

    def decoder(self) -> str:
        """Name of the decoder."""
        return f"gguf {version('gguf')}"

    def decode(self, folder: Path) -> Iterator[Decoded]:  # noqa: ARG002
        """Decode the quantized weights: there are none."""
        return iter(())


def write_imatrix(path: Path, entries: Mapping[str, InputStatistics | Sequence[InputStatistics]]) -> None:
    """Write an importance matrix.

    Args:
        path: path of the file to write.
        entries: name of a GGUF tensor, with ".weight" → statistics of its input; of a tensor of experts, each's.
    """
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)  # an importance matrix is of no architecture
    several = {name: [e] if isinstance(e, InputStatistics) else list(e) for name, e in entries.items()}
    tokens = max((each.tokens for group in several.values() for each in group), default=0)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", max(1, tokens // CHUNK))
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, group in sorted(several.items()):
        width = max(len(each.squares) for each in group)
        sums = np.zeros((len(group), width), np.float32)
        for row, each in zip(sums, group, strict=True):
            if each.tokens:
                row[:] = each.squares.numpy() * each.tokens
        writer.add_tensor(name + SUMS, sums)
        writer.add_tensor(name + COUNTS, np.array([[each.tokens] for each in group], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path, option: str = "data.imatrix") -> dict[str, Squares]:
    """Read mean squares by the name of a GGUF tensor, without ".weight"; experts that no token reached have ones.

    Raises:
        UserError: naming `option`, for a file that is no importance matrix.
    """
    try:
        with path.open("rb") as file:
            magic, size = file.read(4), path.stat().st_size
            entries = _gguf_entries(path) if magic == b"GGUF" else dict(_legacy_entries(file, magic, size))
    except (OSError, ValueError, struct.error, UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{option}={path}: is no importance matrix ({' '.join(str(error).split()):.120})") from error
    if not entries:
        raise UserError(f"{option}={path}: is no importance matrix (it has no entries)")
    return {name.removesuffix(".weight"): squares for name, squares in entries.items()}


def _gguf_entries(path: Path) -> dict[str, Squares]:
    check_gguf(path)
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for key, sums in tensors.items():
        if key.endswith(SUMS):
            name = key.removesuffix(SUMS)
            counts = tensors[name + COUNTS].reshape(-1, 1)
            found[name] = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), np.float32(1))
    return found


def _legacy_entries(file: BinaryIO, magic: bytes, size: int) -> Iterator[tuple[str, Squares]]:
    (count,) = struct.unpack("<i", magic)
    if not 0 < count < LIMIT or size > LIMIT:
        raise ValueError(f"{count} entries in {size} bytes")
    for _ in range(count):
        (length,) = struct.unpack("<i", file.read(4))
        if not 0 < length < 1024:
            raise ValueError(f"a name of {length} bytes")
        name = file.read(length).decode()
        calls, values = struct.unpack("<ii", file.read(8))
        data = file.read(4 * values) if 0 < values <= size // 4 else b""
        if len(data) != 4 * values or not data:
            raise ValueError(f"{values} values for {name}")
        squares = np.frombuffer(data, "<f4").astype(np.float32) / max(calls, 1)
        yield name, squares[None]


def squares_by_module(squares: Mapping[str, Squares], model: PreTrainedModel) -> dict[str, Squares]:
    """Mean squares by a module's full name in transformers.

    Raises:
        UserError: the model's architecture has no such tensors.
    """
    tensors, found = modules_by_tensor(model), {}
    for name, own in squares.items():
        modules = tensors.get(name, [])
        for number, module in enumerate(modules):
            found[module] = own[number : number + 1] if len(own) == len(modules) else own[:1]
    if not found:
        raise UserError(f"data.imatrix: has {next(iter(squares))} and the like, none of which the model has")
    return found
