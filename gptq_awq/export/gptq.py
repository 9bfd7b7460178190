"""GPTQ checkpoints (arXiv 2210.17323): the layout of AutoGPTQ, GPTQModel and vLLM's `gptq`.

Tensors of a linear with `out` rows, `in` columns, codes of b bits and G groups:

    qweight (in·b/32, out)   int32   codes of each output channel, packed without gaps down its column
    qzeros  (G, out·b/32)    int32   zero points of each group, stored as z - 1 in v1, as z in v2
    scales  (G, out)
    g_idx   (in,)            int32   group of each input column

v1 ("gptq") is the original convention and can't store z = 0; v2 ("gptq_v2") stores zero points unchanged. The config
names the convention; engines that don't know v2 would read every zero point one too high.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.config import read_config
from gptq_awq.export.folder import FolderTensors, write_packed
from gptq_awq.export.packing import (
    PRODUCER,
    WORD,
    PackedFormat,
    exactly,
    one_int_grid,
    pack_words,
    require_multiple,
    unpack_words,
    unquantized,
)
from gptq_awq.export.saved import stored_weights
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass

BITS = (2, 3, 4, 8)
CHECKPOINT_FORMAT = {"v1": "gptq", "v2": "gptq_v2"}


@checked_dataclass
class GPTQFormat(PackedFormat):
    """Export to a GPTQ folder, 2, 3, 4 or 8 bits.

    Attributes:
        dtype: dtype of the scales and of unquantized parameters, float16 or bfloat16.
        zero_point: v1 (stores z - 1), v2 (stores z), or auto: v1 for symmetric grids, as every engine reads
            it; v2 for asymmetric grids, whose z may be 0 and which GPTQModel reads from other producers in v2 only.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: an unknown zero_point.
    """

    dtype: Dtype = "float16"
    zero_point: Literal["auto", "v1", "v2"] = "auto"
    shard: ByteSize = "4GB"
    name: str = "gptq"

    def version(self, grid: IntGrid) -> str:
        """Zero-point convention for a grid: v1 (z - 1) or v2 (z)."""
        return self.zero_point if self.zero_point != "auto" else "v1" if grid.sym else "v2"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:  # noqa: ARG002 (any model)
        """Raise UserError for grids, bits, widths or zero points that the layout can't store."""
        grid = one_int_grid(linears, self.name, self.dtype, ("float16", "bfloat16"))
        if grid.bits not in BITS:
            raise UserError(
                f"bits={grid.bits}: gptq packs 2, 3, 4 or 8 bits; choose bits=4, or export.formats=[compressed_tensors]"
            )
        if self.version(grid) == "v1" and not grid.sym and grid.min_zero < 1:
            raise UserError(
                "export.gptq.zero_point=v1: it stores zero points less one, and this grid's may be 0; choose "
                "grid.min_zero=1 or export.gptq.zero_point=v2"
            )
        codes = WORD if grid.bits == 3 else WORD // grid.bits
        require_multiple(linears, "columns", codes, self.name)
        require_multiple(linears, "rows", codes, self.name)

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where an unquantized parameter overflows the dtype."""
        dtype, weights = torch_dtype(self.dtype, "export.gptq.dtype"), source.weights
        grid = next(iter(weights.values())).grid
        assert isinstance(grid, IntGrid)
        version, stored = self.version(grid), stored_weights(source)
        natural = all(weight.natural_order for weight in weights.values())
        head = source.model.get_output_embeddings()
        with_head = any(source.model.get_submodule(name) is head for name in weights)
        config = quantization_config(grid, version, desc_act=not natural, lm_head=with_head)
        config |= exclusions(source, list(stored))
        write_packed(source, folder, stored, lambda _, weight: pack(weight, version, dtype), dtype, config, self.shard)
        # Readers older than transformers' own GPTQ support look for the config in this file.
        (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def decoder(self) -> str:
        """Name of our own reader, as GPTQModel's would patch torch, transformers and safetensors in this process."""
        return PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight by reading the packed words bit by bit."""
        config, tensors = read_config(folder)["quantization_config"], FolderTensors(folder)
        bits, offset = config["bits"], 0 if config["checkpoint_format"] == "gptq_v2" else 1
        for key in [key for key in tensors if key.endswith(".qweight")]:
            name = key.removesuffix(".qweight")
            qweight, qzeros, scales, g_idx = (tensors[f"{name}.{part}"] for part in PARTS)
            codes = unpack_words(qweight.T, bits, len(g_idx))
            zeros = unpack_words(qzeros, bits, qweight.shape[1]).float() + offset
            group = g_idx.long()
            yield Decoded(name, codes, (scales.float()[group] * (codes.T.float() - zeros[group])).T)


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def pack(weight: QuantizedWeight, version: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one linear into qweight, qzeros, scales and g_idx (layout in the module's docstring).

    Raises:
        ValueError: zero points or scales that can't be stored, which `GPTQFormat.check` refuses beforehand.
    """
    bits = int(weight.grid.bits)
    zeros = weight.zeros.cpu() - (1 if version == "v1" else 0)
    if zeros.min() < 0:
        raise ValueError("v1 stores zero points less one: 0 has no room")
    return {
        "qweight": pack_words(weight.codes.cpu(), bits).T.contiguous(),
        "qzeros": pack_words(zeros.T.to(torch.uint8), bits),
        "scales": exactly(weight.scales.T, dtype, "scales"),
        "g_idx": weight.group_of_column.to("cpu", torch.int32),
    }


def exclusions(source: Source, packed: Sequence[str]) -> dict[str, Any]:
    """Entries of the config that keep engines from expecting packed weights of matrices in the blocks that have none.

    GPTQModel and vLLM go by `dynamic`, where a minus excludes a pattern; optimum, and so transformers, by the names of
    those that are `packed`. Where all matrices in the blocks are packed there are no such entries.
    """
    prefix, _ = find_blocks(source.model)
    if not (left := [name for name in unquantized(source) if name.startswith(f"{prefix}.")]):
        return {}
    return {
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in left},
        "modules_in_block_to_quantize": [list(packed)],
    }


def quantization_config(grid: IntGrid, version: str, desc_act: bool, lm_head: bool = False) -> dict[str, Any]:
    """Build the `quantization_config` of config.json and quantize_config.json.

    Args:
        grid: grid that all quantized weights share.
        version: zero-point convention, v1 or v2.
        desc_act: whether any linear's g_idx is out of natural order; engines take False to mean that none is.
        lm_head: whether the output head is quantized too.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": CHECKPOINT_FORMAT[version],
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.sym,
        "desc_act": desc_act,
        "lm_head": lm_head,
        "pack_dtype": "int32",
        "meta": {"quantizer": [PRODUCER]},
    }
