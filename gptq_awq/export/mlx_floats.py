"""MLX's floating-point modes: nvfp4, mxfp4 and mxfp8. Codes are packed as MLX packs integers; scales are bytes.

    weight (out, in·bits/32)  uint32   codes of each row, lowest bit first
    scales (out, G)           uint8    E4M3 (nvfp4, groups of 16) or E8M0 (groups of 32)

mlx-lm's layers hold no scale of a tensor, so that NVFP4 takes `grid.tensor_scale=1`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.export.compressed_floats import exponents
from gptq_awq.export.packing import pack_words, unpack_words
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.scaled_float import ScaledFloatGrid

_MODES = {("e2m1", "e4m3", 16): "nvfp4", ("e2m1", "e8m0", 32): "mxfp4", ("e4m3", "e8m0", 32): "mxfp8"}


def mode_of(grid: Grid) -> str:
    """MLX's mode for a grid: `affine` for integers.

    Raises:
        UserError: floating-point numbers that MLX has no mode for.
    """
    if not isinstance(grid, ScaledFloatGrid):
        return "affine"
    mode = _MODES.get((grid.element, grid.scale, grid.group_size))
    if mode is None:
        raise UserError(f"grid={grid.label}: mlx has modes for nvfp4, mxfp4 and mxfp8; choose one of these")
    if mode == "nvfp4" and grid.tensor_scale != 1:
        raise UserError("export.formats=mlx: mlx-lm's NVFP4 holds no scale of the tensor; set grid.tensor_scale=1")
    return mode


def pack_floats(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack one linear into weight and scales."""
    grid, scales = weight.grid, weight.scales.cpu()
    assert isinstance(grid, ScaledFloatGrid)
    stored = exponents(scales) if grid.scale == "e8m0" else scales.to(torch.float8_e4m3fn).view(torch.uint8)
    return {"weight": pack_words(weight.codes.cpu(), grid.bits).view(torch.uint32), "scales": stored}


def decode_floats(parts: Mapping[str, Tensor], bits: int, group: int, mode: str) -> tuple[Tensor, Tensor]:
    """Decode codes bit by bit, and weights by tables of every code's value."""
    scales = parts["scales"]
    codes = unpack_words(parts["weight"].view(torch.int32), bits, scales.shape[1] * group)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    s = table[scales.int()] if mode == "nvfp4" else torch.exp2(scales.float() - 127)
    if bits == 4:
        table = torch.tensor([sign * x for sign in (1, -1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    return codes, table[codes.int()] * s.repeat_interleave(group, 1)


def decode_floats_with_mlx(parts: Mapping[str, Tensor], bits: int, group: int, mode: str) -> tuple[Tensor, Tensor]:
    """Decode weights with MLX's dequantization in float32, and codes bit by bit."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    words, scales = (mx.array(parts[name].numpy()) for name in ("weight", "scales"))
    weight = mx.dequantize(words, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32, stream=mx.cpu)
    return decode_floats(parts, bits, group, mode)[0], torch.from_numpy(np.array(weight))
