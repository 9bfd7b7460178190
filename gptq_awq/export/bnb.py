"""bitsandbytes checkpoints as transformers saves them: NF4 and FP4 (QLoRA), and the 8-bit weights of LLM.int8().

4 bits (QLoRA, arXiv 2305.14314), for a weight of n elements in row-major order, in blocks of `group_size`:

    weight (n/2, 1)  uint8      two codes per byte, the first one in the high bits
    weight.absmax (blocks,)     float32; with double quantization uint8 codes of the 8-bit dynamic data type
    weight.quant_map (16,)      table of the 16 levels
    weight.nested_absmax (⌈blocks/256⌉,), weight.nested_quant_map (256,)     with double quantization only
    weight.quant_state.bitsandbytes__nf4 (or fp4)     JSON as bytes: block size, dtype, shape, the absmax's offset

8 bits (LLM.int8(), arXiv 2208.07339), one scale s per row: ŵ = CB · SCB / 127

    weight (out, in)  int8      CB = code - 128
    SCB (out,)        float32   SCB = 127 s
    weight_format ()  uint8     0: row-major

127 s is exact, as s has at most 11 significant bits; so is CB · (SCB / 127), in float32, as SCB / 127 is s again.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.folder import FolderTensors, write_packed
from gptq_awq.export.packing import PRODUCER, PackedFormat, require_natural_order, require_plain_head
from gptq_awq.export.saved import stored_weights
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.table import LEVELS, NESTED_GROUPS, TableGrid, dynamic_levels
from gptq_awq.models.linear import is_linear
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes 0.50 supports; earlier versions lack 32."""
INT8 = "int8"
_STATE = "weight.quant_state.bitsandbytes__"


@checked_dataclass
class BnbFormat(PackedFormat):
    """Export to a transformers folder with bitsandbytes weights: NF4, FP4 or INT8.

    Attributes:
        dtype: dtype of unquantized parameters: float16, bfloat16 or float32.
        compute_dtype: dtype of matrix products with 4-bit weights; auto: the value of `dtype`.
        llm_int8_threshold: outlier threshold of LLM.int8(): input columns with a magnitude above it are multiplied
            in 16 bits, inputs of all others are rounded to 8 bits.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: an unknown dtype or compute_dtype.
    """

    dtype: Dtype = "float16"
    compute_dtype: Dtype | Literal["auto"] = "auto"
    llm_int8_threshold: float = 6.0
    shard: ByteSize = "4GB"
    name: str = "bnb"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the model card on how bitsandbytes rounds while it computes."""
        return (
            "4 bits: on a CPU with AVX512-BF16, bitsandbytes rounds scales and inputs to bfloat16 as it multiplies; "
            "elsewhere it computes in bnb_4bit_compute_dtype.",
            "8 bits: LLM.int8 rounds inputs to 8 bits too, but for columns beyond llm_int8_threshold.",
        )

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:  # noqa: ARG002 (every model fits)
        """Raise UserError for grids and widths that bitsandbytes can't store."""
        require_natural_order(linears, self.name, " or method.solver.act_order=false")
        require_plain_head(linears, self.name, "export.formats=[hf]")
        kinds = {kind(linear.grid) for linear in linears}
        if len(kinds) > 1:
            raise UserError(f"grid: bnb holds one kind of weights, not {' and '.join(sorted(kinds))}; choose grid=nf4")
        for linear in linears:
            if isinstance(linear.grid, TableGrid):
                _check_blocks(linear)

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where an unquantized parameter overflows the dtype."""
        dtype = torch_dtype(self.dtype, "export.bnb.dtype")
        stored, config = stored_weights(source), self._config(source)
        write_packed(source, folder, stored, lambda _, weight: pack(weight, self.dtype), dtype, config, self.shard)

    def _config(self, source: Source) -> dict[str, Any]:
        """Build config.json's `quantization_config`, which names the linears that stay unquantized."""
        grid = next(iter(source.weights.values())).grid
        skipped = [
            name for name, module in source.model.named_modules() if is_linear(module) and name not in source.weights
        ]
        compute = torch_dtype(self.dtype if self.compute_dtype == "auto" else self.compute_dtype, "compute_dtype")
        if isinstance(grid, TableGrid):
            options: dict[str, Any] = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": grid.table,
                "bnb_4bit_use_double_quant": grid.double_quant,
                "bnb_4bit_compute_dtype": compute,
            }
        else:
            options = {"load_in_8bit": True, "llm_int8_threshold": float(self.llm_int8_threshold)}
        return BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped).to_dict()

    def decoder(self) -> str:
        """Name of the decoder: bitsandbytes where it is installed, else our own reader."""
        return f"bitsandbytes {version('bitsandbytes')}" if _has_bnb() else PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight, in float32."""
        tensors = FolderTensors(folder)
        for key in [key for key in tensors if key.endswith(".SCB")]:
            name = key.removesuffix(".SCB")
            yield Decoded(name, *_decode_int8(tensors[f"{name}.weight"], tensors[key]))
        for key in [key for key in tensors if f".{_STATE}" in key]:
            name = key.partition(f".{_STATE}")[0]
            own = [part for part in tensors if part.startswith(f"{name}.")]
            parts = {part.removeprefix(f"{name}."): tensors[part] for part in own}
            read = _decode_with_bnb if _has_bnb() else _decode_4bit
            yield Decoded(name, *read(parts))


def kind(grid: Grid) -> str:
    """Name of the bitsandbytes data type of a grid: nf4, fp4 or int8. Raises UserError where there is none."""
    if isinstance(grid, TableGrid) and grid.table in ("nf4", "fp4"):
        return grid.table
    if isinstance(grid, IntGrid) and grid.bits == 8 and grid.group_size == -1 and grid.sym:
        if grid.scale_dtype == "float32":
            raise UserError("grid.scale_dtype=float32: 127 · scale would be rounded; choose grid.scale_dtype=float16")
        return INT8
    raise UserError(
        f"grid={grid.label}: bnb holds NF4, FP4 and 8-bit rows; choose grid=nf4, grid=fp4, or "
        "bits=8 group_size=-1 sym=true"
    )


def _check_blocks(linear: LinearSpec) -> None:
    size, columns = linear.grid.group_size, linear.columns
    fitting = [str(block) for block in BLOCKS if columns % block == 0]
    if size in BLOCKS and columns % size == 0:
        return
    if not fitting:
        raise UserError(
            f"export.formats=bnb: blocks are of 32 columns or more, and {linear.name} has {columns}; leave bnb out, or "
            "choose bits=8 group_size=-1 sym=true"
        )
    raise UserError(
        f"group_size={size}: bnb's blocks are powers of two from 32 to 4096, and must divide the {columns} columns of "
        f"{linear.name} (it takes weights as one long row); choose group_size={' or '.join(fitting)}"
    )


def pack(weight: QuantizedWeight, dtype: str = "float16") -> dict[str, Tensor]:
    """Pack one linear into the tensors that bitsandbytes loads (layout in the module's docstring).

    Args:
        weight: quantized weight on a table grid or an 8-bit per-row grid.
        dtype: dtype that bitsandbytes dequantizes 4-bit weights to by default.
    """
    if isinstance(weight.grid, TableGrid):
        return _pack_4bit(weight, weight.grid, dtype)
    return {
        "weight": (weight.codes.cpu().to(torch.int16) - 128).to(torch.int8),
        "SCB": weight.scales.cpu().float()[:, 0] * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _pack_4bit(weight: QuantizedWeight, grid: TableGrid, dtype: str) -> dict[str, Tensor]:
    """Pack one linear on an NF4 or FP4 grid, with its scales in float32 or doubly quantized."""
    codes = weight.codes.cpu().reshape(-1, 2)
    state: dict[str, Any] = {
        "quant_type": grid.table,
        "blocksize": grid.group_size,
        "dtype": dtype,
        "shape": list(weight.codes.shape),
    }
    tensors = {
        "weight": codes[:, :1] << 4 | codes[:, 1:],
        "weight.absmax": weight.scales.cpu().float().flatten(),
        "weight.quant_map": torch.tensor(LEVELS[grid.table]),
    }
    if grid.double_quant:
        tensors["weight.absmax"] = weight.store["absmax_codes"].cpu().to(torch.uint8).flatten()
        tensors["weight.nested_absmax"] = weight.store["nested_scales"].cpu().float().flatten()
        tensors["weight.nested_quant_map"] = dynamic_levels().clone()
        state |= {
            "nested_blocksize": NESTED_GROUPS,
            "nested_dtype": "float32",
            "nested_offset": weight.store["offset"].item(),
        }
    tensors[f"{_STATE}{grid.table}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


Matrix = tuple[UInt8[Tensor, "out in"], Float[Tensor, "out in"]]


def _decode_int8(cb: Tensor, scb: Tensor) -> Matrix:
    """Decode INT8 codes and weights as CB · (SCB / 127), as bitsandbytes computes it for training on a CPU.

    Its `int8_vectorwise_dequant` multiplies (CB · SCB) · (1/127) instead; that product of 25 bits is rounded once
    more where s has all of its 11 bits, and may be off by one unit in the last place.
    """
    return (cb.to(torch.int16) + 128).to(torch.uint8), cb.float() * (scb / 127)[:, None]


def _decode_4bit(parts: Mapping[str, Tensor]) -> Matrix:
    """Decode codes and weights from NF4 or FP4 tensors without bitsandbytes."""
    state, codes, absmax = _state(parts), _codes(parts), parts["weight.absmax"]
    if "nested_blocksize" in state:
        owner = torch.arange(len(absmax)) // state["nested_blocksize"]
        absmax = parts["weight.nested_quant_map"][absmax.int()] * parts["weight.nested_absmax"][owner]
        absmax = absmax + state["nested_offset"]
    levels = parts["weight.quant_map"][codes.int()]
    return codes, (levels.reshape(-1, state["blocksize"]) * absmax[:, None]).reshape(codes.shape)


def _decode_with_bnb(parts: Mapping[str, Tensor]) -> Matrix:
    """Decode weights with bitsandbytes' `dequantize_4bit`, and codes with our own reader, as it has none."""
    from bitsandbytes.functional import QuantState, dequantize_4bit  # pyright: ignore[reportMissingImports]

    stats = {key: value for key, value in parts.items() if key not in ("weight", "bias")}
    state = QuantState.from_dict(stats, torch.device("cpu"))
    state.dtype = torch.float32
    return _codes(parts), dequantize_4bit(parts["weight"], state)


def _codes(parts: Mapping[str, Tensor]) -> UInt8[Tensor, "out in"]:
    """Unpack 4-bit codes, two per byte with the first one in the high bits."""
    octets = parts["weight"].reshape(-1)
    return torch.stack([octets // 16, octets % 16], 1).reshape(_state(parts)["shape"])


def _state(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parse the JSON of a 4-bit weight's quant_state."""
    key = next(key for key in parts if key.startswith(_STATE))
    return json.loads(bytes(parts[key].tolist()))


def _has_bnb() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
