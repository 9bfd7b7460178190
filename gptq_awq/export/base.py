"""What an export format is: a frozen dataclass that checks, writes and decodes.

`check` runs before calibration and refuses what the format can't hold exactly, naming what would fit. `write` packs
the very codes that the solver chose. `decode` reads them back with an independent decoder, the format's own library
where there is one, for the verifier to compare.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.linear import is_linear, matrix


@dataclass(frozen=True)
class LinearSpec:
    """A weight that will be quantized, as it is known before calibration.

    Attributes:
        name: of the module in the model.
        rows: output channels.
        columns: input channels.
        grid: where it will land.
        natural_order: whether groups will be made of neighbouring columns (act_order without static groups
            makes them of others, which only few formats can store).
        head: whether it is the output head.
    """

    name: str
    rows: int
    columns: int
    grid: Grid
    natural_order: bool = True
    head: bool = False


def linear_specs(model: nn.Module, grids: Mapping[str, Grid], natural_order: bool) -> list[LinearSpec]:
    """What will be quantized, as formats want to know it, from the grids that weights will land on."""
    specs, head = [], model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    for name, grid in grids.items():
        module = model.get_submodule(name)
        rows, columns = (matrix(module) if is_linear(module) else module.get_parameter("weight")).shape
        specs.append(LinearSpec(name, rows, columns, grid, natural_order, module is head))
    return specs


@dataclass(frozen=True)
class Source:
    """A quantized model, as exporters get it.

    Attributes:
        model: its linears hold dequantized weights.
        tokenizer: of transformers.
        name: as tables print it.
        weights: module name → codes, scales, zeros.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    weights: Mapping[str, QuantizedWeight] = field(repr=False)


@dataclass(frozen=True)
class Decoded:
    """One quantized weight, read back from a checkpoint.

    Attributes:
        name: of the module in the model.
        codes: (out, in) in the solver's own numbering, columns in the layer's order; None where the format
            keeps no codes (dequantized weights).
        weight: (out, in), what an engine computes with, before any rounding to its compute dtype.
    """

    name: str
    codes: UInt8[Tensor, "out in"] | None
    weight: Float[Tensor, "out in"]


@runtime_checkable
class Format(Protocol):
    """A checkpoint format."""

    @property
    def name(self) -> str:
        """As in export.formats and OUT/checkpoints/NAME."""
        ...

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError for what the format can't hold exactly; the line says what would fit."""
        ...

    def write(self, source: Source, folder: Path) -> None:
        """Write a complete checkpoint into an empty folder."""
        ...

    def decoder(self) -> str:
        """What `decode` reads with: a library and its version, or "gptq_awq" for its own reader."""
        ...

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Every quantized weight of a checkpoint, unpacked independently of how it was packed."""
        ...


def require_dtype(grid: Grid, dtype: str, name: str) -> None:
    """Raise UserError where a checkpoint of this dtype would round the grid's scales once more."""
    kept = getattr(grid, "scale_dtype", "float16")
    if kept != dtype and not (dtype == "float32"):
        raise UserError(
            f"export.{name}.dtype={dtype}: the grid's scales are {kept}; choose export.{name}.dtype={kept} or "
            f"grid.scale_dtype={dtype}"
        )


def torch_dtype(name: str, option: str) -> torch.dtype:
    """The dtype of that name. Raises UserError naming `option`."""
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise UserError(f"{option}={name}: choose one of {', '.join(known)}")
    return known[name]
