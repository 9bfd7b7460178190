"""The interface of an export format: a frozen dataclass that checks, writes and decodes checkpoints.

`check` runs before calibration and refuses grids that the format can't store exactly, naming ones that it can.
`write` packs the codes that the solver chose, unchanged. `decode` reads them back with an independent decoder (the
format's own library where there is one), so that the verifier can compare.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.calibration.input_statistics import InputStatistics
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.experts import experts_in
from gptq_awq.models.linear import matrix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearSpec:
    """Shape and grid of a weight to be quantized, as known before calibration.

    Attributes:
        name: module name in the model.
        rows: number of output channels.
        columns: number of input channels.
        grid: grid that the weight will be quantized to.
        natural_order: whether each group will consist of neighbouring columns (act_order without static groups
            groups scattered columns, which only few formats can store).
        head: whether the module is the output head.
        expert: whether the module is of an expert of a mixture.
    """

    name: str
    rows: int
    columns: int
    grid: Grid
    natural_order: bool = True
    head: bool = False
    expert: bool = False


def linear_specs(model: nn.Module, grids: Mapping[str, Grid], natural_order: bool) -> list[LinearSpec]:
    """Specifications of the linears to be quantized, from the module name → grid assignment."""
    specs, head = [], model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    experts = tuple(f"{name}." for name in experts_in(model))
    for name, grid in grids.items():
        module = model.get_submodule(name)
        rows, columns = matrix(module).shape
        specs.append(LinearSpec(name, rows, columns, grid, natural_order, module is head, name.startswith(experts)))
    return specs


@dataclass(frozen=True)
class Source:
    """A quantized model with its codes, the input of every exporter.

    Attributes:
        model: transformers model whose quantized linears hold dequantized weights.
        tokenizer: transformers tokenizer of the model.
        name: display name of the model, as result tables print it.
        weights: module name → quantized weight (codes, scales, zeros).
        inputs: module name → what calibration saw of the linear's input, for formats that store it; None: nothing.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    weights: Mapping[str, QuantizedWeight] = field(repr=False)
    inputs: Mapping[str, InputStatistics] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Decoded:
    """One quantized weight decoded from a checkpoint.

    Attributes:
        name: module name in the model.
        codes: (out, in) integer codes as the solver numbers them, columns in the layer's order; None where the
            format keeps no codes (dequantized weights).
        weight: (out, in) dequantized weight, before any rounding to an engine's compute dtype.
    """

    name: str
    codes: UInt8[Tensor, "out in"] | None
    weight: Float[Tensor, "out in"]


@runtime_checkable
class Format(Protocol):
    """Interface of a checkpoint format: check, write, decode."""

    @property
    def name(self) -> str:
        """Name of the format, as in export.formats and OUT/checkpoints/NAME."""
        ...

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError unless the format can store every linear exactly; the message names a choice that fits."""
        ...

    def write(self, source: Source, folder: Path) -> None:
        """Write a complete checkpoint into an empty folder."""
        ...

    def decoder(self) -> str:
        """Name of the decoder behind `decode`: a library with its version, or "gptq_awq:VERSION" for our own reader."""
        ...

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight of a checkpoint, with code independent of the packing."""
        ...


@runtime_checkable
class ChecksModel(Protocol):
    """A format that also looks at the model and its tokenizer before calibration."""

    def check_model(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> list[str]:
        """Raise UserError for what the format's readers can't run; the sentences returned are said as warnings."""
        ...


@contextmanager
def in_words_of(told: str) -> Iterator[None]:
    """Context manager that turns whatever a library raises into a UserError: format and library, and its own words."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of what a library doesn't know, in whichever way it notices
        log.debug("%s", told, exc_info=True)
        what = re.sub(rf"{re.escape(gettempdir())}/[\w-]+", "its folder", " ".join(str(error).split())) or repr(error)
        raise UserError(
            f"export.formats={told} ({type(error).__name__}: {what:.200}); choose another format, such as hf"
        ) from error


def require_dtype(grid: Grid, dtype: str, name: str) -> None:
    """Raise UserError if storing the grid's scales in the checkpoint's dtype would round them again."""
    kept = getattr(grid, "scale_dtype", "float16")
    if kept != dtype and not (dtype == "float32"):
        raise UserError(
            f"export.{name}.dtype={dtype}: the grid's scales are {kept}; choose export.{name}.dtype={kept} or "
            f"grid.scale_dtype={dtype}"
        )


def torch_dtype(name: str, option: str) -> torch.dtype:
    """Torch dtype by name: float16, bfloat16 or float32. Raises UserError that names `option` for any other."""
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise UserError(f"{option}={name}: choose one of {', '.join(known)}")
    return known[name]
