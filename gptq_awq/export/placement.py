"""Where a conversion moves the elements of a model's tensors, observed on numbered ones: no table of architectures.

Another library's converter is given tensors whose elements hold their own numbers. What comes out says, element by
element, which weight went where: rows permuted, experts stacked, fused matrices split or joined. float32 counts to
2²⁴ only, so numbers are given as digits, one conversion for each; a last conversion gives the first digit mirrored,
which tells elements that were moved from those that a conversion computed (norms + 1 would pass for their neighbours).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BASE = 1 << 23
"""Numbers below it are exact in float32, also after a constant is added, which the mirrored digit then reveals."""
AT_ONCE = 1 << 22
Indices = Int[np.ndarray, "n"]


@dataclass(frozen=True)
class Numbering:
    """Numbers for all elements of some tensors, from 1 on: a conversion that pads writes zeros.

    Attributes:
        shapes: tensor name → shape.
        first: tensor name → number of its first element.
    """

    shapes: Mapping[str, tuple[int, ...]]
    first: Mapping[str, int]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Numbering":
        """Number the elements of all tensors, in order."""
        first, total = {}, 1
        for name, shape in shapes.items():
            first[name] = total
            total += math.prod(shape) + 1  # a number that no element has, so that no run goes on in the next tensor
        return cls(dict(shapes), first)

    @property
    def total(self) -> int:
        """All numbers are below it."""
        return max((self.first[name] + math.prod(shape) for name, shape in self.shapes.items()), default=0)

    @property
    def passes(self) -> int:
        """Conversions that it takes to observe: one for each digit, and the mirrored one."""
        return max(1, math.ceil(math.log(self.total + 1, BASE))) + 1

    def digits(self, name: str, number: int) -> Float[Tensor, "..."]:
        """One tensor for conversion `number`: a digit of each element's number; the last one mirrors the first."""
        shape = self.shapes[name]
        numbers = torch.arange(self.first[name], self.first[name] + math.prod(shape))
        mirrored = number == self.passes - 1
        digit = numbers.div(1 if mirrored else BASE**number, rounding_mode="floor") % BASE
        return (BASE - 1 - digit if mirrored else digit).float().reshape(shape)

    def runs(self, digits: list[Float[np.ndarray, "..."]]) -> "Runs | None":
        """Runs of numbers in a converted tensor, from all passes; None where any element was computed."""
        flat = [np.ascontiguousarray(each).reshape(-1) for each in digits]
        pieces = [self._runs([each[at : at + AT_ONCE] for each in flat], at) for at in range(0, len(flat[0]), AT_ONCE)]
        if not pieces or any(piece is None for piece in pieces):
            return None
        starts, positions = (np.concatenate(part) for part in zip(*pieces, strict=True))  # pyright: ignore[reportArgumentType]
        lengths = np.diff(positions, append=len(flat[0]))
        joined = np.flatnonzero(starts[1:] == starts[:-1] + lengths[:-1]) + 1  # a run over the end of a piece
        return Runs(np.delete(starts, joined), np.diff(np.delete(positions, joined), append=len(flat[0])))

    def _runs(self, digits: list[np.ndarray], at: int) -> tuple[np.ndarray, np.ndarray] | None:
        *low, mirrored = digits
        whole = all(np.isfinite(each).all() and (each == np.floor(each)).all() for each in digits)
        if not whole or (low[0] != BASE - 1 - mirrored.astype(np.float64)).any():
            return None
        numbers = sum(each.astype(np.int64) * BASE**i for i, each in enumerate(low))
        assert isinstance(numbers, np.ndarray)
        if numbers.min() < 1 or numbers.max() > self.total:
            return None
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        positions = np.concatenate([[0], breaks])
        return numbers[positions], positions + at

    def split(self, runs: "Runs") -> "Iterator[tuple[str, Indices, Indices, Indices]]":
        """Tensors that runs are of: name, starts within it, positions in the converted tensor, and lengths."""
        names, firsts = list(self.first), np.array(list(self.first.values()))
        positions = np.concatenate([[0], np.cumsum(runs.lengths)[:-1]])
        owner = np.searchsorted(firsts, runs.starts, side="right") - 1
        for index in np.unique(owner):
            mine = owner == index
            yield names[index], runs.starts[mine] - firsts[index], positions[mine], runs.lengths[mine]

    def joined(self, parts: Iterable[tuple[str, Indices, Indices, Indices]]) -> "Runs":
        """Runs of a converted tensor that consists of parts; the inverse of `split`."""
        starts, positions, lengths = (
            np.concatenate(each)
            for each in zip(*((starts + self.first[name], *rest) for name, starts, *rest in parts), strict=True)
        )
        order = np.argsort(positions)
        return Runs(starts[order], lengths[order])


@dataclass(frozen=True)
class Runs:
    """A converted tensor, flattened, as runs of consecutive elements.

    Attributes:
        starts: number of each run's first element.
        lengths: elements of each run.
    """

    starts: Int[np.ndarray, "runs"]
    lengths: Int[np.ndarray, "runs"]


def indices(starts: Int[np.ndarray, "runs"], lengths: Int[np.ndarray, "runs"]) -> Int[np.ndarray, "elements"]:
    """Indices that runs stand for: each start, and what follows it."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
