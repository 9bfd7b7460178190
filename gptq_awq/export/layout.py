"""Where another library puts every tensor of a model, as observed; and `layout.npz`, which keeps it beside the files.

A tensor of a file consists of runs of consecutive elements of the model's tensors: rows in another order, experts
stacked, fused matrices split. Packed blocks or rows can follow where runs begin and end with whole ones. Tensors that
the library computes (norms + 1, -exp A) are kept in layout.npz as the model has them, so that a checkpoint can be read
back into a transformers model without the library.
"""

import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded
from gptq_awq.export.placement import Indices, Numbering, Runs, indices
from gptq_awq.export.saved import Read, read_state, state_shapes
from gptq_awq.models.offload import each_tensor
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.atomic import replacing

LAYOUT = "layout.npz"


@dataclass(frozen=True)
class Part:
    """Elements of one of the model's tensors within a tensor of the file, as runs.

    Attributes:
        name: name in the model's state dict.
        starts: first element of each run, in the flattened tensor (out, in).
        positions: where the run begins in the flattened tensor of the file.
        lengths: number of elements.
    """

    name: str
    starts: Indices
    positions: Indices
    lengths: Indices

    def whole_blocks(self, block: int) -> bool:
        """Whether runs begin and end with whole blocks of `block` elements, in both tensors."""
        return not any((array % block).any() for array in (self.starts, self.positions, self.lengths))


@dataclass(frozen=True)
class Layout:
    """Layout of a file in terms of the model's tensors.

    Attributes:
        numbering: numbers of the elements of the model's tensors, matrices as (out, in).
        runs: tensor of the file → the runs that it consists of; tensors that were computed are left out.
        computed: the model's tensors that are in no run → their values; without values before writing.
        exact: quantized weights whose codes could not follow, at least in part; float32 holds their values.
        flipped: weights that the model holds as (in, out).
    """

    numbering: Numbering
    runs: Mapping[str, Runs]
    computed: Mapping[str, np.ndarray] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    flipped: frozenset[str] = frozenset()

    def parts(self, tensor: str) -> list[Part]:
        """Parts of a tensor of the file; none for a computed one."""
        runs = self.runs.get(tensor)
        return [] if runs is None else [Part(*split) for split in self.numbering.split(runs)]

    @property
    def computed_size(self) -> int:
        """Number of elements in computed tensors."""
        return sum(values.size for values in self.computed.values())

    def lost(self) -> list[str]:
        """Names of the model's tensors that are in no run."""
        found = {part.name for tensor in self.runs for part in self.parts(tensor)}
        return [name for name in self.numbering.shapes if name not in found]

    def types(self, kinds: Mapping[str, str], unit: Callable[[str, str], int], reader: str) -> dict[str, str]:
        """Tensor of the file → type to store it in, or "F32" where its codes can't follow it.

        Args:
            kinds: tensors of the model that are quantized → type of their grid.
            unit: number of neighbouring elements that are packed together, by a tensor's name and type.
            reader: the library, for messages.

        Raises:
            UserError: weights of several grids are stored in one tensor.
        """
        found = {}
        for tensor in self.runs:
            parts = self.parts(tensor)
            wanted = {kinds.get(part.name) for part in parts}
            if wanted == {None}:
                continue
            if len(wanted - {None}) > 1:
                of = {kinds[part.name]: part.name for part in parts if part.name in kinds}
                raise UserError(
                    f"export.formats: {reader} has one type for "
                    + " and ".join(f"{name} ({kind})" for kind, name in of.items())
                    + f" in {tensor}; choose one grid for them"
                )
            kind = next(iter(wanted - {None}))
            assert kind is not None
            fits = None not in wanted and all(part.whole_blocks(unit(part.name, kind)) for part in parts)
            found[tensor] = kind if fits else "F32"
        return found

    def not_as_codes(self, types: Mapping[str, str], quantized: Collection[str]) -> set[str]:
        """Quantized weights whose codes can't follow, at least in part: values are stored in their place."""
        held = {part.name for tensor, kind in types.items() if kind == "F32" for part in self.parts(tensor)}
        return (held | set(self.lost())) & set(quantized)

    def notes(self, types: Mapping[str, str], quantized: Collection[str], format_name: str, reader: str) -> list[str]:
        """Sentences on quantized weights that are stored otherwise than as codes."""
        exact = [tensor for tensor, kind in types.items() if kind == "F32"]
        lost = set(quantized) & set(self.lost())
        notes = []
        if exact:
            notes.append(
                f"{format_name}: {reader} keeps {len(exact)} tensors in an order that codes can't follow, such as "
                f"{exact[0]}; they are stored as rounded, in float32"
            )
        if lost:
            notes.append(
                f"{format_name}: {reader} computes what it stores for {len(lost)} weights, such as {min(lost)}; "
                "they are stored as rounded, in the dtype of unquantized matrices"
            )
        return notes

    def with_values(self, model: PreTrainedModel, exact: Mapping[str, Tensor]) -> "Layout":
        """This layout with the values of tensors that are in no run: exact ones (out, in), or the model's."""
        lost = set(self.lost())
        computed = {name: tensor.float().cpu().numpy() for name, tensor in each_tensor(model, lost.__contains__)}
        computed |= {name: values.numpy() for name, values in exact.items() if name in lost}
        return replace(self, computed=computed, exact=tuple(exact))

    def write(self, folder: Path) -> None:
        """Write layout.npz."""
        self.save(folder / LAYOUT)

    def save(self, path: Path) -> None:
        """Write the layout into a file."""
        head = {
            "shapes": self.numbering.shapes,
            "tensors": list(self.runs),
            "counts": [len(runs.starts) for runs in self.runs.values()],
            "exact": self.exact,
            "flipped": sorted(self.flipped),
        }
        arrays: dict[str, Any] = {f"computed/{name}": values for name, values in self.computed.items()}
        starts, lengths = ([getattr(runs, of) for runs in self.runs.values()] for of in ("starts", "lengths"))
        arrays["starts"] = np.diff(np.concatenate(starts), prepend=0)  # regular, and so small when compressed
        arrays["lengths"] = np.concatenate(lengths)
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, folder: Path) -> "Layout":
        """Read layout.npz. Raises ValueError for one that contradicts itself."""
        return cls.load(folder / LAYOUT)

    @classmethod
    def load(cls, path: Path) -> "Layout":
        """Read a file that `save` wrote. Raises ValueError for one that contradicts itself."""
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            cuts = np.cumsum(head["counts"])[:-1]
            starts, lengths = np.split(np.cumsum(file["starts"]), cuts), np.split(file["lengths"], cuts)
            computed = {key.removeprefix("computed/"): file[key] for key in file.files if key.startswith("computed/")}
        runs = {name: Runs(*pair) for name, *pair in zip(head["tensors"], starts, lengths, strict=True)}
        numbering = Numbering.of({name: tuple(shape) for name, shape in head["shapes"].items()})
        return cls(numbering, runs, computed, tuple(head["exact"]), frozenset(head["flipped"]))


def conv1d_weights(model: PreTrainedModel) -> set[str]:
    """Names of weights that modules hold as (in, out)."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def numbered(model: PreTrainedModel, only: Collection[str] | None = None) -> tuple[Numbering, frozenset[str]]:
    """Numbers of the elements of a model's tensors, matrices as (out, in), and the names of those held as (in, out).

    Args:
        model: a model.
        only: names of the tensors that count; None: all.
    """
    flipped, found = frozenset(conv1d_weights(model)), sorted(state_shapes(model).items())
    shapes = {name: s[::-1] if name in flipped else s for name, s in found if only is None or name in only}
    return Numbering.of(shapes), flipped


def digits_of(numbering: Numbering, flipped: Collection[str], number: int) -> Read:
    """Reader of tensors that hold digit `number` of their elements' numbers in place of a model's weights."""

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            digits = numbering.digits(name, number)
            yield name, digits.T if name in flipped else digits

    return read


def replacing_weights(model: PreTrainedModel, exact: Mapping[str, Tensor]) -> Read:
    """Reader of a model's tensors with some replaced by exact values (out, in)."""
    own, flipped = read_state(model), conv1d_weights(model)

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from own([name for name in names if name not in exact])
        yield from ((n, exact[n].T if n in flipped else exact[n]) for n in names if n in exact)

    return read


def kept_layout(name: str, observe: Callable[[], Layout]) -> Layout:
    """The layout that is kept in the cache under a name, observed where there is none."""
    kept = cache_dir() / "layouts" / f"{name}.npz"
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        return Layout.load(kept)
    layout = observe()
    with suppress(OSError):  # the next run observes again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as scratch:
            layout.save(scratch)
    return layout


class Flat(NamedTuple):
    """A tensor of a file, decoded and flattened: its name there, float32 values, and codes where it is quantized."""

    name: str
    weight: Float[np.ndarray, "n"]
    codes: UInt8[np.ndarray, "n"] | None


class WholeTensor(NamedTuple):
    """One of the model's tensors, put together from a file's.

    Attributes:
        name: name in the model's state dict, such as "model.layers.0.self_attn.q_proj.weight".
        weight: dequantized float32 values, matrices as (out, in).
        codes: codes of a quantized matrix (out, in); None where any part of it has none.
    """

    name: str
    weight: Float[np.ndarray, "..."]
    codes: UInt8[np.ndarray, "out in"] | None


def put_together(tensors: Iterable[Flat], layout: Layout, most: int) -> Iterator[WholeTensor]:
    """The model's tensors of a file, each as soon as it is whole.

    Args:
        tensors: those of the file.
        layout: the file's layout.
        most: elements that the file can hold at most.

    Raises:
        ValueError: the layout is of another file.
    """
    shapes = layout.numbering.shapes
    left = {name: math.prod(shape) for name, shape in shapes.items()}
    if sum(left.values()) > 2 * most + layout.computed_size:
        raise ValueError("its layout is of more weights than it holds")
    partial: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for tensor, values, codes in tensors:
        parts = layout.parts(tensor)
        if parts and sum(int(part.lengths.sum()) for part in parts) != len(values):
            raise ValueError(f"{tensor} is not what its layout says")
        for part in (part for part in parts if left[part.name]):
            size = math.prod(shapes[part.name])
            empty = np.empty(size, np.float32), None if codes is None else np.empty(size, np.uint8)
            whole, own = partial.setdefault(part.name, empty)
            _scatter(part, values, whole)
            if codes is None or own is None:
                partial[part.name] = whole, None
            else:
                _scatter(part, codes, own)
            left[part.name] -= int(part.lengths.sum())
            if left[part.name] <= 0:
                weight, own = partial.pop(part.name)
                left[part.name], shape = 0, shapes[part.name]
                yield WholeTensor(part.name, weight.reshape(shape), None if own is None else own.reshape(shape))
    yield from (WholeTensor(name, values, None) for name, values in layout.computed.items())


def quantized(folder: Path, read: Callable[[Path, Layout], Iterable[WholeTensor]]) -> Iterator[Decoded]:
    """The quantized weights that `read` finds in a folder; those that are stored as values have no codes."""
    layout = Layout.read(folder)
    for tensor in read(folder, layout):
        if tensor.codes is not None or tensor.name in layout.exact:
            codes = None if tensor.codes is None else torch.from_numpy(tensor.codes)
            yield Decoded(tensor.name.removesuffix(".weight"), codes, torch.from_numpy(tensor.weight))


def unquantized(folder: Path, read: Callable[[Path, Layout], Iterable[WholeTensor]]) -> dict[str, Tensor]:
    """The other tensors that `read` finds in a folder, by their names in the model and as it holds them."""
    layout = Layout.read(folder)
    values = {
        tensor.name: torch.from_numpy(tensor.weight)
        for tensor in read(folder, layout)
        if tensor.codes is None and tensor.name not in layout.exact
    }
    return {name: value.T if name in layout.flipped else value for name, value in values.items()}


def _scatter(part: Part, source: np.ndarray, target: np.ndarray) -> None:
    """Copy a part's elements from a flattened tensor of a file into the flattened tensor of the model."""
    if len(part.starts) <= 1 + len(target) // 1024:
        for start, at, n in zip(part.starts.tolist(), part.positions.tolist(), part.lengths.tolist(), strict=True):
            target[start : start + n] = source[at : at + n]
    else:
        target[indices(part.starts, part.lengths)] = source[indices(part.positions, part.lengths)]
