"""compressed-tensors' floating-point formats: NVFP4, MXFP4, MXFP8 and FP8, and the schemes of activations beside them.

Tensors of a linear with `out` rows, `in` columns and G groups of neighbouring columns:

    nvfp4-pack-quantized   weight_packed        (out, in/2)  uint8    two codes a byte, the first in the lower half
                           weight_scale         (out, G)     E4M3
                           weight_global_scale  (1,)         float32  divides weight_scale: 1 / the tensor's scale
    mxfp4-pack-quantized   weight_packed        (out, in/2)  uint8
                           weight_scale         (out, G)     uint8    E8M0: 127 + the exponent
    mxfp8-quantized        weight               (out, in)    E4M3
                           weight_scale         (out, G)     uint8    E8M0
    float-quantized        weight               (out, in)    E4M3
                           weight_scale         (out, 1), (1,), or (out/128, in/128)   float32
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.dynamic import DynamicFP8, DynamicInt, input_scale
from gptq_awq.grids.scaled_float import ScaledFloatGrid, block_scales

Scheme = Literal["int8", "fp8", "nvfp4", "mxfp4"]
"""Activations' number format in a checkpoint's config."""

_FORMATS = {
    ("e2m1", "e4m3", 16): "nvfp4-pack-quantized",
    ("e2m1", "e8m0", 32): "mxfp4-pack-quantized",
    ("e4m3", "e8m0", 32): "mxfp8-quantized",
}
_BLOCK = 128


def float_format(grid: Grid) -> str | None:
    """Name of the format that holds a grid; None where the library has none."""
    if not isinstance(grid, ScaledFloatGrid):
        return None
    if grid.element == "e4m3" and grid.scale == "float32":
        strategies = {(1, -1), (-1, -1), (_BLOCK, _BLOCK)}
        return "float-quantized" if (grid.rows, grid.group_size) in strategies else None
    return _FORMATS.get((grid.element, grid.scale, grid.group_size))


def pack_float(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack one linear into the tensors of its format (layout in the module's docstring)."""
    grid, codes, scales = weight.grid, weight.codes.cpu(), weight.scales.cpu()
    assert isinstance(grid, ScaledFloatGrid)
    if grid.element == "e2m1":
        parts: dict[str, Tensor] = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4}
    else:
        parts = {"weight": codes.view(torch.float8_e4m3fn)}
    if grid.scale == "e8m0":
        return parts | {"weight_scale": exponents(scales)}
    if grid.scale == "float32":
        return parts | {"weight_scale": _shared_once(scales, grid)}
    assert grid.tensor_scale is not None
    blocks = block_scales(scales, grid.tensor_scale).to(torch.float8_e4m3fn)
    return parts | {"weight_scale": blocks, "weight_global_scale": torch.tensor([1 / grid.tensor_scale])}


def exponents(scales: Float[Tensor, "out groups"]) -> UInt8[Tensor, "out groups"]:
    """E8M0 codes of powers of two."""
    return (torch.frexp(scales).exponent - 1 + 127).to(torch.uint8)


def _shared_once(scales: Float[Tensor, "out groups"], grid: ScaledFloatGrid) -> Tensor:
    """Scales that rows share, once each."""
    if grid.rows == 1:
        return scales.float()
    return scales[0].float() if grid.rows == -1 else scales[::_BLOCK].float()


def float_scheme(grid: ScaledFloatGrid) -> dict[str, Any]:
    """`weights` of a config group."""
    scheme: dict[str, Any] = {"num_bits": grid.bits, "type": "float", "symmetric": True, "dynamic": False}
    if grid.scale == "float32":
        strategy = {1: "channel", -1: "tensor", _BLOCK: "block"}[grid.rows]
        return scheme | {"strategy": strategy} | ({"block_structure": [_BLOCK, _BLOCK]} if strategy == "block" else {})
    kinds = {"e4m3": ("tensor_group", "torch.float8_e4m3fn"), "e8m0": ("group", "torch.uint8")}
    strategy, dtype = kinds[grid.scale]
    return scheme | {"strategy": strategy, "group_size": grid.group_size, "scale_dtype": dtype, "zp_dtype": dtype}


def activation_scheme(name: Scheme, static: bool = False) -> dict[str, Any]:
    """`input_activations` of a config group: scales from each token (and group of channels) while the engine runs.

    Static ones are in the file, one for a linear (`input_scales`); NVFP4's scale of the tensor always is.
    """
    if name in ("int8", "fp8"):
        scheme: dict[str, Any] = {"num_bits": 8, "type": "int" if name == "int8" else "float", "symmetric": True}
        return scheme | {"strategy": "tensor" if static else "token", "dynamic": not static}
    scheme = {"num_bits": 4, "type": "float", "symmetric": True}
    if name == "nvfp4":
        dtype = "torch.float8_e4m3fn"
        scheme |= {"strategy": "tensor_group", "group_size": 16, "dynamic": "local", "observer": "static_minmax"}
    else:
        dtype = "torch.uint8"
        scheme |= {"strategy": "group", "group_size": 32, "dynamic": True}
    return scheme | {"scale_dtype": dtype, "zp_dtype": dtype}


def input_scales(name: Scheme | None, static: bool, largest: float) -> dict[str, Tensor]:
    """Static scales of a linear's input by their tensors' names, from the largest magnitude that calibration saw."""
    if name == "nvfp4":
        return {"input_global_scale": input_scale(largest)}
    if not static or name not in ("int8", "fp8"):
        return {}
    grid = DynamicInt(8, static=True) if name == "int8" else DynamicFP8(static=True)
    return {"input_scale": grid.scale_of(torch.tensor([largest]))}


def kv_cache_scheme() -> dict[str, Any]:
    """`kv_cache_scheme` of a config: keys and values in E4M3, scales from each token."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def read_floats_with_library(parts: Mapping[str, Tensor], group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode codes and weight of one linear with the compressed-tensors library."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    compressor: Any = BaseCompressor.get_value_from_registry(group["format"])
    weight = compressor.decompress(dict(parts), QuantizationScheme.model_validate(group))["weight"]
    return codes_of(parts), weight.float()


def read_floats(parts: Mapping[str, Tensor], group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode codes and weight of one linear by tables of their own: every code's value, worked out from its bits."""
    codes, kind = codes_of(parts), group["weights"]
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if kind["num_bits"] == 4:
        table = torch.tensor([sign * x for sign in (1, -1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    scale = parts["weight_scale"]
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"]
    rows, columns = codes.shape
    if kind["strategy"] == "block":
        scale = scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
    elif kind["strategy"] in ("group", "tensor_group"):
        scale = scale.repeat_interleave(kind["group_size"], 1)
    return codes, table[codes.int()] * scale


def codes_of(parts: Mapping[str, Tensor]) -> UInt8[Tensor, "out in"]:
    """Codes of one linear, read from its bytes; a negative zero counts as zero."""
    if "weight_packed" not in parts:
        return parts["weight"].view(torch.uint8)
    packed = parts["weight_packed"]
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


def check_float(grid: Grid) -> None:
    """Raise UserError for a float grid that the library has no format for."""
    if float_format(grid) is None:
        raise UserError(
            f"export.formats=compressed_tensors: has no format for grid={grid.label} ({grid}); choose nvfp4, mxfp4, "
            "mxfp8 or fp8 per channel (grid.rows=1), tensor (-1) or 128 x 128 (grid.rows=128 grid.group_size=128)"
        )
