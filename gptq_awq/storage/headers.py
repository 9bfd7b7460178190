"""Headers of GGUF and safetensors files, checked against the files' sizes before a library reads them.

A header may claim more values than the file has bytes. The libraries believe it: they would allocate, or go on reading
nothing for ever.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MOST_HEADER = 100_000_000
"""Largest header of a safetensors file, as its format says."""
MOST_VALUES = 8_000_000
"""Most values in all arrays of a GGUF header, each of which costs the gguf library some 300 bytes."""
MOST_KEYS, MOST_TENSORS, MOST_DIMENSIONS = 65_536, 1_000_000, 4
_MAGIC, _VERSIONS = 0x46554747, (2, 3)
_SCALARS: Mapping[GGUFValueType, str] = {
    **{GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h"},
    **{GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q"},
    **{GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?"},
}


@dataclass(frozen=True)
class GGUFHeader:
    """Keys and shapes of tensors that the header of a GGUF file names.

    Attributes:
        fields: scalars and texts by key; of an array, its length.
        shapes: shape of each tensor by name, fastest dimension first, as in the file.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def check_gguf(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file, every count and length of which must fit into the file.

    Raises:
        OSError: it can't be opened.
        ValueError: it is no GGUF file, or claims what it doesn't hold.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it ends within its header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()


class _Reader:
    """A position in the bytes of a GGUF file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size, self._values = data, 0, len(data), 0

    def header(self) -> GGUFHeader:
        """Read keys and tensors. Raises ValueError for what the file doesn't hold."""
        if self._number("I") != _MAGIC or self._number("I") not in _VERSIONS:
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise ValueError(f"it claims {keys} keys and {tensors} tensors")
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in fields:
                raise ValueError(f"it has the key {key[:100]!r} twice")
            fields[key] = self._value(self._kind())
        infos = [self._tensor() for _ in range(tensors)]
        self._check_places(infos, fields.get("general.alignment", 32))
        shapes = {name: shape for name, shape, _, _ in infos}
        if len(shapes) < len(infos):
            raise ValueError("it has two tensors of one name")
        return GGUFHeader(fields, shapes)

    def _check_places(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> None:
        """Raise ValueError for a tensor whose data aren't in the file."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("its alignment is no power of two")
        start = -(-self._at // alignment) * alignment
        for name, _, offset, count in infos:
            if start + offset + count > self._size:
                raise ValueError(f"the data of {name[:100]!r} are not in the file")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, offset and number of bytes of a tensor."""
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name[:100]!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name[:100]!r} is of the unknown type {kind}") from error
        numbers = 1
        for length in shape:
            numbers *= length
        if shape[0] % block or 0 in shape:
            raise ValueError(f"{name[:100]!r} has rows of {shape[0]}, not of blocks of {block}")
        return name, shape, offset, numbers // block * size

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._number(_SCALARS[kind])
        inner, length = self._kind(), self._number("Q")
        self._values += length
        if inner == GGUFValueType.ARRAY or self._values > MOST_VALUES:
            raise ValueError("it has an array of arrays, or more values than a tokenizer needs")
        if inner == GGUFValueType.STRING:
            for _ in range(length):
                self._skip(self._number("Q"))
        else:
            self._skip(length * struct.calcsize(_SCALARS[inner]))
        return length

    def _kind(self) -> GGUFValueType:
        try:
            return GGUFValueType(self._number("I"))
        except ValueError as error:
            raise ValueError("it has a value of an unknown type") from error

    def _text(self) -> str:
        start = self._skip(self._number("Q"))
        return self._data[start : self._at].decode("utf-8")

    def _number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self._data, self._skip(struct.calcsize(f"<{code}")))[0]

    def _skip(self, count: int) -> int:
        """Go on by `count` bytes, and return where they begin. Raises ValueError where the file has fewer."""
        start, self._at = self._at, self._at + count
        if self._at > self._size:
            raise ValueError("it ends within its header")
        return start


def safetensors_places(path: Path) -> dict[str, tuple[int, int]]:
    """Map each tensor of a safetensors file to its first byte and its end (format: 8 bytes of length, JSON, data).

    Raises:
        OSError: it can't be opened.
        ValueError: it is no safetensors file, or claims what it doesn't hold.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError(f"its header of {length} bytes is not in the file")
        try:
            entries = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is no map")
    start, found = 8 + length, {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or [type(each) for each in offsets] != [int, int]:
            raise ValueError(f"{name[:100]!r} has no place")
        first, last = offsets
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"the data of {name[:100]!r} are not in the file")
        found[name] = start + first, start + last
    return found
