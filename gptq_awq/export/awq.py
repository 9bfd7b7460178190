"""AWQ checkpoints (arXiv 2306.00978): AutoAWQ's GEMM layout, 4 bits.

Tensors of a linear with `out` rows, `in` columns and G groups of neighbouring columns:

    qweight (in, out/8)  int32   codes of eight neighbouring output channels in a word
    qzeros  (G, out/8)   int32   zero points of eight neighbouring output channels in a word
    scales  (G, out)

The nibbles of a word, lowest first, hold the channels 0 2 4 6 1 3 5 7, as AWQ's kernels unpack two at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor
from transformers import PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.config import read_config
from gptq_awq.export.folder import FolderTensors, write_packed
from gptq_awq.export.packing import (
    PRODUCER,
    PackedFormat,
    exactly,
    one_int_grid,
    pack_words,
    require_linear_modules,
    require_multiple,
    require_natural_order,
    require_plain_head,
    require_whole_groups,
    unpack_words,
    unquantized,
)
from gptq_awq.export.saved import stored_weights
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass

BITS = 4
CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


@checked_dataclass
class AWQFormat(PackedFormat):
    """Export to an AWQ folder; symmetric grids are stored with zero point 8 everywhere.

    Attributes:
        dtype: dtype of the scales and of unquantized parameters, float16 or bfloat16.
        shard: maximum size of a safetensors file.
    """

    dtype: Dtype = "float16"
    shard: ByteSize = "4GB"
    name: str = "awq"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError for grids, bits, column orders or widths that the layout can't store."""
        grid = one_int_grid(linears, self.name, self.dtype, ("float16", "bfloat16"))
        if grid.bits != BITS:
            raise UserError(
                f"bits={grid.bits}: awq packs 4 bits; choose bits=4, or export.formats=[gptq] or [compressed_tensors]"
            )
        require_whole_groups(linears, self.name)
        require_natural_order(linears, self.name, ", or export.formats=[gptq]")
        require_linear_modules(config, self.name)
        require_plain_head(linears, self.name, "export.formats=[gptq] or [compressed_tensors]")
        require_multiple(linears, "rows", len(CHANNEL_OF_NIBBLE), self.name)

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where an unquantized parameter overflows the dtype."""
        dtype = torch_dtype(self.dtype, "export.awq.dtype")
        grid = next(iter(source.weights.values())).grid
        assert isinstance(grid, IntGrid)
        config, stored = quantization_config(grid, unquantized(source)), stored_weights(source)
        write_packed(source, folder, stored, lambda _, weight: pack(weight, dtype), dtype, config, self.shard)

    def decoder(self) -> str:
        """Name of our own reader, as no library reads this layout on a CPU without patching others."""
        return PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight by reading the packed words bit by bit."""
        group_size = read_config(folder)["quantization_config"]["group_size"]
        tensors = FolderTensors(folder)
        for key in [key for key in tensors if key.endswith(".qweight")]:
            name = key.removesuffix(".qweight")
            scales = tensors[f"{name}.scales"].float()
            codes, zeros = (channels(tensors[f"{name}.{part}"]) for part in ("qweight", "qzeros"))
            size = len(codes) if group_size == -1 else group_size
            if size * len(scales) != len(codes):
                raise ValueError(f"{name}: {len(scales)} groups of {size} columns are not its {len(codes)}")
            scale, zero = (values.repeat_interleave(size, 0) for values in (scales, zeros.float()))
            yield Decoded(name, codes.T.contiguous(), (scale * (codes.float() - zero)).T)


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one linear into qweight, qzeros and scales (layout in the module's docstring).

    Raises:
        ValueError: the dtype can't represent the scales, which `AWQFormat.check` refuses beforehand.
    """
    return {
        "qweight": words(weight.codes.cpu().T),
        "qzeros": words(weight.zeros.cpu().T.to(torch.uint8)),
        "scales": exactly(weight.scales.T, dtype, "scales"),
    }


def words(codes: UInt8[Tensor, "n out"]) -> Int32[Tensor, "n words"]:
    """Pack eight neighbouring channels into each word, in the kernels' nibble order."""
    blocks = codes.reshape(len(codes), -1, 8)
    return pack_words(blocks[..., list(CHANNEL_OF_NIBBLE)].reshape(codes.shape), BITS)


def channels(packed: Int32[Tensor, "n words"]) -> UInt8[Tensor, "n out"]:
    """Unpack words into channels in natural order (the inverse of `words`)."""
    nibbles = unpack_words(packed, BITS, 8 * packed.shape[1]).reshape(len(packed), -1, 8)
    return nibbles[..., list(NIBBLE_OF_CHANNEL)].reshape(len(packed), -1)


def quantization_config(grid: IntGrid, skipped: Sequence[str]) -> dict[str, Any]:
    """Build config.json's `quantization_config`; `skipped` names the linears that stay unquantized."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(skipped) or None,
        "meta": {"quantizer": [PRODUCER]},
    }
