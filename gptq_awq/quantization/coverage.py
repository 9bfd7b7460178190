"""Coverage: the share of the weights in a language model's layers that a run rounds, and what it leaves, and why.

Weights are the entries of matrices (and of larger tensors, such as fused experts and kernels of convolutions); norms
and biases are not counted. Embeddings, output heads and what the language model doesn't contain, such as a vision
tower, are told beside the share, which is of all other matrices.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_awq.models.blocks import find_blocks, language_modules
from gptq_awq.models.linear import KEPT, ROUTER, is_linear

log = logging.getLogger(__name__)
LITTLE = 0.9
"""Share below which the coverage is a warning: what is left out of ordinary models is much less than a tenth."""
KINDS_TOLD = 6


@dataclass(frozen=True)
class Left:
    """Weights of one kind that stay as they are.

    Attributes:
        kind: class of the modules that hold them, and the parameter's name where the class doesn't say it.
        why: reason that they stay.
        tensors: number of tensors.
        weights: number of entries.
        counted: whether they are in the share's denominator.
    """

    kind: str
    why: str
    tensors: int
    weights: int
    counted: bool

    def __str__(self) -> str:
        return f"{self.tensors} {self.kind} {_amount(self.weights)} ({self.why})"


@dataclass(frozen=True)
class Coverage:
    """Weights in a language model's layers, those that are rounded, and kinds of those that stay, largest first."""

    weights: int
    rounded: int
    left: tuple[Left, ...]

    @property
    def share(self) -> float:
        """Share of the weights in the layers that is rounded."""
        return self.rounded / max(self.weights, 1)

    def row(self) -> dict[str, Any]:
        """The coverage as JSON, for the manifest."""
        left = [
            {"kind": x.kind, "why": x.why, "tensors": x.tensors, "weights": x.weights, "in_share": x.counted}
            for x in self.left
        ]
        return {"share": self.share, "weights": self.weights, "rounded": self.rounded, "left": left}

    def __str__(self) -> str:
        told = [str(x) for x in self.left[:KINDS_TOLD]]
        told += [f"{len(self.left) - KINDS_TOLD} more kinds"] if len(self.left) > KINDS_TOLD else []
        share = f"{int(1000 * self.share) / 10:.1f}%"  # rounded down: 100.0% is all
        line = f"{share} of {_amount(self.weights)} weights in the layers will be rounded"
        return f"{line}; left: {', '.join(told)}" if told else line

    def tell(self, say: Callable[[str], None] = log.info) -> None:
        """Say the coverage; it is a warning where much is left."""
        (say if self.share >= LITTLE else log.warning)(str(self))


def coverage_of(model: nn.Module, rounded: Set[str] | Mapping[str, Any]) -> Coverage:
    """The coverage of a model, given the names of the modules whose weights are rounded."""
    total = done = 0
    kinds: dict[tuple[str, str, bool], list[int]] = {}
    decoder = {id(p) for module in language_modules(model) for p in module.parameters(recurse=False)}
    ends, (prefix, _) = _ends(model), find_blocks(model)
    for name, module, weight in _matrices(model):
        size, key = weight.numel(), id(weight)
        counted = key in decoder and key not in ends
        total += size * counted
        if name in rounded and module.weight is weight:
            done += size * counted
            continue
        kind, why = ends.get(key) or (_kind(module, weight), _reason(module, name, key in decoder, prefix))
        tally = kinds.setdefault((kind, why, counted), [0, 0])
        tally[0] += 1
        tally[1] += size
    left = [Left(kind, why, tensors, size, counted) for (kind, why, counted), (tensors, size) in kinds.items()]
    return Coverage(total, done, tuple(sorted(left, key=lambda x: (not x.counted, -x.weights))))


def _amount(weights: int) -> str:
    return f"{weights / 1e6:.1f}M" if weights >= 1e5 else f"{weights:,}"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter of two dimensions or more once, with the module that holds it and that module's name."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, module, parameter


def _ends(model: nn.Module) -> dict[int, tuple[str, str]]:
    """Kind and reason of embeddings and output heads, by the id of their weights."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model.get_output_embeddings(), "weight", None)  # pyright: ignore[reportCallIssue]
    ends = {id(weight): ("embeddings", "the grid has none for them") for weight in embeddings}
    if head is not None:
        tied = id(head) in ends
        ends[id(head)] = ("embeddings", "tied to the output head") if tied else ("output head", "head=rtn or solve")
    return ends


def _kind(module: nn.Module, weight: nn.Parameter) -> str:
    """Class of the module that holds a weight, and the weight's name there."""
    own = next(name for name, parameter in module.named_parameters(recurse=False) if parameter is weight)
    return f"{type(module).__name__}.{own}"


def _reason(module: nn.Module, name: str, in_decoder: bool, prefix: str) -> str:
    """Reason that a matrix in the module of this name stays as it is."""
    if not in_decoder:
        return "no part of the language model"
    if (left := getattr(module, "left", None)) is not None:
        return left
    if "router" in type(module).__name__.lower():
        return ROUTER
    if not name.startswith(f"{prefix}."):
        return f"outside of the blocks, {prefix}"
    return KEPT if is_linear(module) else "no linear layer"
