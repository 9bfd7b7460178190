"""Tensors of a transformers folder's files by name, with dtype and shape, as transformers chooses among the files."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_awq.errors import UserError

WEIGHTS = {"model.safetensors": "model*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}
"""Names of whole files, in the order in which transformers looks for them, and patterns of their parts."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file that holds it.
        dtype: kind and bits, as safetensors spells them: F32, BF16, F8_E4M3, I8.
        shape: its shape.
        parts: of a tensor that is decoded when it is read, what each part is, its file and its name there.
        decode: makes the tensor of its parts; None: it is in the file as it is.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[Path, str]] = field(default_factory=dict, compare=False)
    decode: Callable[[Mapping[str, Tensor]], Tensor] | None = field(default=None, compare=False)

    def read(self, name: str, get: Callable[[Path, str], Tensor]) -> Tensor:
        """The tensor of this name; `get` reads one of a file, by its name there."""
        if self.decode is None:
            return get(self.file, name)
        return self.decode({what: get(*place) for what, place in self.parts.items()})

    def places(self, name: str) -> list[tuple[Path, str]]:
        """Files, and names there, of all that is read for the tensor of this name."""
        return list(self.parts.values()) or [(self.file, name)]

    @property
    def holds_numbers(self) -> bool:
        """Whether its elements are floating-point numbers of 16 bits or more."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def holds_small_floats(self) -> bool:
        """Whether its elements are floating-point numbers of 8 bits or less."""
        return self.dtype.startswith("F") and not self.holds_numbers


def stored_tensors(folder: Path, option: str) -> dict[str, StoredTensor]:
    """Tensors of the files that transformers would load from a folder, by name; empty where it has none.

    Raises:
        UserError: naming `option` and the file that cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder, option):
        try:
            found |= dict(_in_safetensors(path) if path.suffix == ".safetensors" else _in_pickle(path))
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{option}: cannot be loaded: {path.name} cannot be read ({reason})") from error
    return found


def weight_files(folder: Path, option: str) -> list[Path]:
    """A folder's weight files: a whole one, else those that an index names, else the parts that there are.

    Raises:
        UserError: naming `option`, where an index is damaged or names a file that isn't there.
    """
    for whole, parts in WEIGHTS.items():
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _indexed(index, option)
        if found := sorted(folder.glob(parts)):
            return found
    return []


def _indexed(index: Path, option: str) -> list[Path]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        files = sorted({index.parent / name for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{option}: cannot be loaded: {index.name} has no weight_map of tensors and files; fetch it again"
        ) from error
    for path in files:
        if not path.is_file():
            raise UserError(f"{option}: cannot be loaded: {index.name} names {path.name}, which isn't there")
    return files


def _in_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            view = file.get_slice(name)
            yield name, StoredTensor(path, view.get_dtype(), tuple(view.get_shape()))


def _in_pickle(path: Path) -> Iterable[tuple[str, StoredTensor]]:
    """Tensors of a pickled file, none of whose bytes are read into memory; none at all of a file older than zip."""
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # transformers, which reads it as a whole, says what is wrong
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            kind = "BF" if tensor.dtype == torch.bfloat16 else "F" if tensor.is_floating_point() else "I"
            yield name, StoredTensor(path, f"{kind}{8 * tensor.itemsize}", tuple(tensor.shape))
