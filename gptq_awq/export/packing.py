"""Packing of integer codes into 32-bit words, and the requirements that packed formats have on a model.

GPTQ and compressed-tensors lay codes of b bits end to end, lowest bit first: 32 codes fill b words, and a code of
3, 5, 6 or 7 bits may straddle two. Packing shifts codes into integers while unpacking reads single bits, so that
neither repeats a mistake of the other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import gptq_awq
from gptq_awq.errors import UserError
from gptq_awq.export.base import LinearSpec, Source, require_dtype
from gptq_awq.export.saved import renaming, saved_weights, stored_weights
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.carried import carried_names
from gptq_awq.models.experts import experts_in

WORD = 32
CONV1D_MODELS = ("gpt2", "openai-gpt")

PRODUCER = f"gptq_awq:{gptq_awq.__version__}"
"""Name and version of this package, as checkpoint configs record the producer."""


class PackedFormat:
    """Methods of formats that hold a packed linear for each of the model's, and for each matrix of an expert."""

    def check_model(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> list[str]:  # noqa: ARG002
        """Raise UserError for a mixture whose checkpoints keep experts in one tensor; readers want one for each."""
        if experts_in(model):
            saved_weights(model, {linear.name: blank(linear) for linear in linears})
        return []

    def stored(self, source: Source) -> Mapping[str, QuantizedWeight]:
        """Weights under the names that the folder has for them."""
        return {name: stored.weight for name, stored in stored_weights(source).items()}


def pack_words(codes: UInt8[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack each row's codes without gaps into ⌈n · bits / 32⌉ words; unused bits of the last word are 0."""
    rows, n = codes.shape
    octets = torch.nn.functional.pad(codes, (0, -n % WORD)).contiguous().numpy()
    # Eight one-byte codes form a 64-bit integer; merging neighbours, then pairs, then fours closes the gaps.
    eights = octets.view("<u8")
    for lane in (8, 16, 32):
        low = np.uint64(sum((1 << lane) - 1 << at for at in range(0, 64, 2 * lane)))
        eights = (eights & low) | ((eights >> np.uint64(lane)) & low) << np.uint64(lane * bits // 8)
    stream = eights.view(np.uint8).reshape(rows, -1, 8)[..., :bits]
    words = np.ascontiguousarray(stream).reshape(rows, -1).view("<i4")[:, : -(-n * bits // WORD)]
    return torch.from_numpy(np.ascontiguousarray(words, dtype=np.int32))


def unpack_words(words: Int32[Tensor, "rows words"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """Unpack the first n codes of each row, bit by bit (the inverse of `pack_words`).

    Raises ValueError where the words don't hold so many codes.
    """
    if not (1 <= bits <= 8 and 0 <= n * bits <= words.shape[1] * WORD):
        raise ValueError(f"rows of {words.shape[1]} words do not hold {n} codes of {bits} bits")
    octets = np.ascontiguousarray(words.numpy(), dtype="<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, count=n * bits, bitorder="little").reshape(len(words), n, bits)
    codes = np.zeros((len(words), n), dtype=np.uint8)
    for bit in range(bits):
        codes |= stream[..., bit] << bit
    return torch.from_numpy(codes)


def exactly(values: Float[Tensor, "..."], dtype: torch.dtype, what: str) -> Tensor:
    """Cast values to a dtype that represents them exactly. Raises ValueError naming `what` where it doesn't."""
    stored = values.cpu().to(dtype)
    if not torch.equal(stored.to(values.dtype), values.cpu()):
        raise ValueError(f"{what} are not all {str(dtype).removeprefix('torch.')} numbers")
    return stored.contiguous()


def int_grids(linears: Sequence[LinearSpec], name: str, dtype: str, dtypes: Sequence[str]) -> list[IntGrid]:
    """Integer grid of each linear, without its range search, which a checkpoint doesn't store.

    Args:
        linears: specifications of the linears to be quantized.
        name: name of the format, for messages.
        dtype: dtype of the checkpoint's scales.
        dtypes: dtypes that the format's engines support.

    Raises:
        UserError: a grid that isn't an integer grid; an unsupported dtype, or one that would round the scales.
    """
    if dtype not in dtypes:
        raise UserError(f"export.{name}.dtype={dtype}: choose one of {', '.join(dtypes)}")
    grids = []
    for linear in linears:
        if not isinstance(linear.grid, IntGrid):
            kind = type(linear.grid).__name__
            raise UserError(f"export.formats={name}: holds integer grids, not {kind}; choose grid=int")
        require_dtype(linear.grid, dtype, name)
        grids.append(linear.grid.without_search())
    return grids


def one_int_grid(linears: Sequence[LinearSpec], name: str, dtype: str, dtypes: Sequence[str]) -> IntGrid:
    """Integer grid that all linears share. Arguments as in `int_grids`; raises UserError also for several grids."""
    grids = int_grids(linears, name, dtype, dtypes)
    for linear, grid in zip(linears, grids, strict=True):
        if grid != grids[0]:
            raise UserError(
                f"export.formats={name}: holds one grid for all layers, {linear.name} has its own; choose grid=int or "
                "export.formats=[compressed_tensors]"
            )
    return grids[0]


def require_whole_groups(linears: Sequence[LinearSpec], name: str) -> None:
    """Raise UserError if the group size doesn't divide a linear's columns, which leaves a shorter last group."""
    for linear in linears:
        if ragged(linear):
            raise UserError(
                f"group_size={linear.grid.group_size}: {name} has no room for the shorter last group of {linear.name} "
                f"({linear.columns} columns); choose {' or '.join(map(str, fitting_groups(linears)))}"
            )


def ragged(linear: LinearSpec) -> bool:
    """Whether the group size doesn't divide the columns, which leaves a shorter last group."""
    return linear.grid.group_size != -1 and linear.columns % linear.grid.group_size != 0


def fitting_groups(linears: Sequence[LinearSpec]) -> list[int]:
    """Group sizes that engines support and that divide every linear's columns, and -1 (one group per row)."""
    width = math.gcd(*(linear.columns for linear in linears))
    return [size for size in (16, 32, 64, 128) if width % size == 0] + [-1]


def require_multiple(linears: Sequence[LinearSpec], dimension: str, multiple: int, name: str) -> None:
    """Raise UserError if a linear's `dimension` ("rows" or "columns") is no multiple of the codes that fill words."""
    for linear in linears:
        size = getattr(linear, dimension)
        if size % multiple:
            raise UserError(
                f"bits={linear.grid.bits}: {name} packs {dimension} in multiples of {multiple}, {linear.name} has "
                f"{size}; choose export.formats=[compressed_tensors]"
            )


def require_natural_order(linears: Sequence[LinearSpec], name: str, others: str) -> None:
    """Raise UserError if a linear's groups don't consist of neighbouring columns; `others` lists more remedies."""
    if not all(linear.natural_order for linear in linears):
        raise UserError(
            f"method.solver.act_order=true: {name} holds groups of neighbouring columns only; choose "
            f"method.solver.static_groups=true{others}"
        )


def require_linear_modules(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError for models whose linears are Conv1D, as the format's readers support torch's Linear only."""
    if config.model_type in CONV1D_MODELS:
        raise UserError(
            f"export.formats={name}: its readers know torch's Linear only, and {config.model_type} has Conv1D; "
            "choose export.formats=[gptq] or [hf]"
        )


def blank(linear: LinearSpec) -> QuantizedWeight:
    """A weight without content, in a linear's shape, to ask where it would go."""
    codes, scales = torch.empty(1, dtype=torch.uint8), torch.empty(1, 1)
    groups = torch.zeros(1, dtype=torch.int64).expand(linear.columns)
    parts = codes.expand(linear.rows, linear.columns), scales.expand(linear.rows, 1), scales.expand(linear.rows, 1)
    return QuantizedWeight(*parts, groups, linear.grid)


def require_plain_head(linears: Sequence[LinearSpec], name: str, others: str) -> None:
    """Raise UserError if the output head is to be quantized, as the format's readers expect it unquantized."""
    if any(linear.head for linear in linears):
        raise UserError(f"head: {name}'s readers take the output head in 16 bits; choose head=null or {others}")


def unquantized(source: Source) -> list[str]:
    """Names of the matrices that stay unquantized: linears, routers, an output head, and what is carried along.

    Embeddings are left out, as readers expect no packed ones. Readers ask by names of the model or of its checkpoint.
    """
    matrices = [name for name, module in source.model.named_modules() if _has_matrix(module)]
    carried = [name.removesuffix(".weight") for name, x in carried_names(source.model).items() if len(x.shape) == 2]
    names = [name for name in (*matrices, *carried) if name not in source.weights]
    return list(dict.fromkeys([*names, *map(renaming(source.model), names)]))


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix `weight`: engines' routers are linears, transformers' needn't be."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)
