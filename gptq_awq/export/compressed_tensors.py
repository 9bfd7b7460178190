"""compressed-tensors checkpoints, the format that llm-compressor writes and that transformers and vLLM read.

Tensors of a linear with `out` rows, `in` columns, codes of b bits and G groups of neighbouring columns:

    pack-quantized   weight_packed      (out, ⌈in·b/32⌉)  int32   codes of each row, packed without gaps
                     weight_zero_point  (⌈out·b/32⌉, G)   int32   zero points, packed down each column (asymmetric)
                     weight_shape       (2,)              int64
    int-quantized    weight             (out, in)         int8    code - 128
                     weight_zero_point  (out, G)          int8    zero point - 128 (asymmetric)
    both             weight_scale       (out, G)

Floating-point formats are in compressed_floats.py. Where linears are on different grids, config.json has one config
group per grid, which lists its linears by name.

The library packs 3, 5, 6 and 7 bits without gaps since 0.18; before, it left the last bits of a word unused. Version
0.19 removed g_idx from the format.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.compressed_floats import (
    activation_scheme,
    check_float,
    float_format,
    float_scheme,
    input_scales,
    kv_cache_scheme,
    pack_float,
    read_floats,
    read_floats_with_library,
)
from gptq_awq.export.config import read_config
from gptq_awq.export.folder import FolderTensors, write_packed
from gptq_awq.export.packing import (
    PRODUCER,
    PackedFormat,
    exactly,
    int_grids,
    pack_words,
    require_linear_modules,
    require_natural_order,
    require_whole_groups,
    unpack_words,
    unquantized,
)
from gptq_awq.export.saved import renaming, stored_weights
from gptq_awq.export.transformers_reader import unbuilt
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.models.experts import experts_in
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass

FORMATS = {"pack": "pack-quantized", "int8": "int-quantized"}
DENSE_SINCE = (0, 18)
ALL = "Linear"
"""Config target that matches every linear, by its class name."""


@checked_dataclass
class CompressedTensorsFormat(PackedFormat):
    """Export to a compressed-tensors folder: integers of 2 to 8 bits, NVFP4, MXFP4, MXFP8 or FP8.

    Attributes:
        dtype: dtype of the scales and of unquantized parameters: float16, bfloat16 or float32.
        layout: pack (codes of 2 to 8 bits in 32-bit words) or int8 (8-bit codes, one byte each; transformers
            reads it, vLLM accepts it only with quantized activations). Floating-point formats have one layout.
        activations: number format that engines round the linears' inputs to, as the config says; null: none (A16).
        static: whether scales of int8 and fp8 inputs are stored, one for a linear, from calibration; NVFP4's always is.
        kv_cache: number format of keys and values in the config; null: none.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: an unknown layout.
    """

    dtype: Dtype = "float16"
    layout: Literal["pack", "int8"] = "pack"
    activations: Literal["int8", "fp8", "nvfp4", "mxfp4"] | None = None
    static: bool = False
    kv_cache: Literal["fp8"] | None = None
    shard: ByteSize = "4GB"
    name: str = "compressed_tensors"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError for grids, bits, column orders or architectures that the format can't store."""
        require_whole_groups(linears, self.name)
        floats = [linear.grid for linear in linears if isinstance(linear.grid, ScaledFloatGrid)]
        for grid in floats:
            check_float(grid)
        if floats and len(floats) < len(linears):
            raise UserError("export.formats=compressed_tensors: integers and floats in one model have no common layout")
        grids = [] if floats else int_grids(linears, self.name, self.dtype, ("float16", "bfloat16", "float32"))
        require_natural_order(linears, self.name, " (g_idx left it in 0.19), or export.formats=[gptq]")
        other = next((grid.bits for grid in grids if grid.bits != 8), None)
        if self.layout == "int8" and other is not None:
            raise UserError(
                f"bits={other}: export.compressed_tensors.layout=int8 holds 8 bits; choose bits=8 or "
                "export.compressed_tensors.layout=pack"
            )
        require_linear_modules(config, self.name)

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where an unquantized parameter overflows the dtype."""
        dtype, weights = torch_dtype(self.dtype, "export.compressed_tensors.dtype"), stored_weights(source)
        packer = pack if self.layout == "pack" else pack_int8

        def parts(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
            codes = pack_float(weight) if isinstance(weight.grid, ScaledFloatGrid) else packer(weight, dtype)
            return codes | self._input_scale(source, name)

        model, rename = source.model, renaming(source.model)
        own = {} if experts_in(model) else source.weights  # readers ask by names of the model and of files
        grids = {name: stored_grid(weight.grid) for name, weight in own.items()}
        grids |= {name: stored_grid(stored.weight.grid) for name, stored in weights.items()}
        head = model.get_output_embeddings()
        heads = [new for name in source.weights if model.get_submodule(name) is head for new in {name, rename(name)}]
        config = quantization_config(grids, FORMATS[self.layout], unquantized(source), self.inputs, heads)
        if self.expands(list(grids.values())) and unbuilt(model, list(source.weights)):
            config["dequantize"] = True
        if self.kv_cache is not None:
            config["kv_cache_scheme"] = kv_cache_scheme()
        write_packed(source, folder, weights, parts, dtype, config, self.shard)

    def expands(self, grids: Sequence[Grid]) -> bool:
        """Whether transformers can expand all weights while it loads them, which it does with a single config group."""
        return len({stored_grid(grid) for grid in grids}) == 1 and self.activations is None

    def _input_scale(self, source: Source, name: str) -> dict[str, Tensor]:
        """Static scale of a linear's input, from the largest that calibration saw."""
        if not self.calibrates:
            return {}
        assert source.inputs is not None  # `calibrates`: the run gathers them
        return input_scales(self.activations, self.static, float(source.inputs[name].largest))

    @property
    def inputs(self) -> Mapping[str, Any] | None:
        """How the config says that inputs are rounded; None: not at all."""
        return None if self.activations is None else activation_scheme(self.activations, self.static)

    @property
    def calibrates(self) -> bool:
        """Whether the format stores what calibration saw of the linears' inputs."""
        return self.activations == "nvfp4" or (self.static and self.activations in ("int8", "fp8"))

    def decoder(self) -> str:
        """Name of the decoder: the library where it is installed and packs without gaps, else our own reader."""
        return f"compressed-tensors {version('compressed-tensors')}" if library_reads() else PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight."""
        groups, tensors = read_config(folder)["quantization_config"]["config_groups"], FolderTensors(folder)
        by_target = {target: group for group in groups.values() for target in group["targets"]}
        for key in [key for key in tensors if key.endswith(".weight_scale")]:
            name = key.removesuffix(".weight_scale")
            parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
            _check_shape(name, parts)
            group = by_target.get(name) or by_target[ALL]
            library, own = READERS[group["weights"]["type"]]
            yield Decoded(name, *(library if library_reads() else own)(parts, group))


def _check_shape(name: str, parts: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a linear's stored shape is not that of its packed codes: readers allocate by it."""
    if "weight_shape" in parts:
        (rows, columns), packed = parts["weight_shape"].tolist(), parts["weight_packed"]
        if rows != len(packed) or not 1 <= columns <= packed.shape[1] * 32:
            raise ValueError(f"{name}: its weight_shape {rows} x {columns} is not that of its codes")


PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale")


def stored_grid(grid: Grid) -> Grid:
    """The grid as a config describes it: without its range search, or a scale of its tensor."""
    grid = grid.without_search()
    return replace(grid, tensor_scale=None) if isinstance(grid, ScaledFloatGrid) else grid


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one linear into the tensors of pack-quantized (layout in the module's docstring).

    Raises:
        ValueError: the dtype can't represent the scales, which `check` refuses beforehand.
    """
    bits = int(weight.grid.bits)
    parts = {
        "weight_packed": pack_words(weight.codes.cpu(), bits),
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_scale": exactly(weight.scales, dtype, "scales"),
    }
    if not is_symmetric(weight):
        zeros = weight.zeros.cpu().T.to(torch.uint8)
        parts["weight_zero_point"] = pack_words(zeros, bits).T.contiguous()
    return parts


def pack_int8(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one linear into the tensors of int-quantized. Raises ValueError if the dtype can't represent the scales."""
    parts = {"weight": signed(weight.codes.cpu()), "weight_scale": exactly(weight.scales, dtype, "scales")}
    if not is_symmetric(weight):
        parts["weight_zero_point"] = signed(weight.zeros.cpu())
    return parts


def signed(codes: Tensor) -> Int[Tensor, "..."]:
    """Shift unsigned codes 0..255 to int8 -128..127."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def is_symmetric(weight: QuantizedWeight) -> bool:
    """Whether the grid is symmetric, so that zero points are implied and not stored."""
    assert isinstance(weight.grid, IntGrid)
    return weight.grid.sym


def quantization_config(
    grids: Mapping[str, Grid],
    format_: str,
    ignore: Sequence[str],
    inputs: Mapping[str, Any] | None = None,
    heads: Sequence[str] = (),
) -> dict[str, Any]:
    """Build config.json's `quantization_config`.

    Args:
        grids: linear's name → grid, without its search options.
        format_: pack-quantized or int-quantized, for integers; floats have one format each.
        ignore: names of the linears that stay unquantized.
        inputs: `input_activations` of every config group; None: inputs stay as they are.
        heads: names of quantized output heads: vLLM's is no Linear, and is found by its name only.
    """
    rounded = {} if inputs is None else {"input_activations": inputs}
    named: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        named.setdefault(grid, []).append(name)
    # Each group repeats the format, as the library would guess pack-quantized where activations are unquantized.
    groups = {
        f"group_{number}": {
            "targets": [ALL, *heads] if len(named) == 1 else names,
            "weights": _weights(grid),
            "format": float_format(grid) or format_,
            **rounded,
        }
        for number, (grid, names) in enumerate(named.items())
    }
    formats = {group["format"] for group in groups.values()}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }
    if format_ == FORMATS["pack"] and [group["weights"]["symmetric"] for group in groups.values()] == [False]:
        # Without this option transformers expects unpacked zero points (seen with compressed-tensors 0.15 to 0.20);
        # with it, transformers supports a single config group only.
        config["dequantize"] = True
    return config


def _weights(grid: Grid) -> dict[str, Any]:
    if isinstance(grid, ScaledFloatGrid):
        return float_scheme(grid)
    assert isinstance(grid, IntGrid)
    channel = grid.group_size == -1
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else grid.group_size,
        "dynamic": False,
    }


def library_reads() -> bool:
    """Whether compressed-tensors is installed in a version that packs without gaps."""
    try:
        major, minor = version("compressed-tensors").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= DENSE_SINCE


def read_with_library(parts: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode codes and weight of one linear with the compressed-tensors library."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    scheme, bits = QuantizationScheme.model_validate(group), group["weights"]["num_bits"]
    # In float32 the product of a code and a 16-bit scale is exact.
    parts = parts | {"weight_scale": parts["weight_scale"].float()}
    compressor: Any = BaseCompressor.get_value_from_registry(group["format"])
    weight = compressor.decompress(parts, scheme)["weight"]
    if "weight_packed" not in parts:
        return (parts["weight"].int() + 128).to(torch.uint8), weight
    codes = unpack_from_int32(parts["weight_packed"], bits, torch.Size(parts["weight_shape"].tolist()))
    return (codes.int() + 2 ** (bits - 1)).to(torch.uint8), weight


def read_with_own_decoder(parts: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode codes and weight of one linear by reading the packed words bit by bit."""
    bits, scale = group["weights"]["num_bits"], parts["weight_scale"].float()
    zero = parts.get("weight_zero_point")
    if "weight_packed" in parts:
        rows, columns = parts["weight_shape"].tolist()
        codes = unpack_words(parts["weight_packed"], bits, columns)
        zeros = None if zero is None else unpack_words(zero.T, bits, rows).T
    else:
        codes = parts["weight"].view(torch.uint8) ^ 128  # two's complement: the sign bit is all that differs
        zeros = None if zero is None else zero.view(torch.uint8) ^ 128
    zeros = torch.full_like(scale, 2 ** (bits - 1)) if zeros is None else zeros.float()
    size = codes.shape[1] // scale.shape[1]
    scale, zeros = (values.repeat_interleave(size, 1) for values in (scale, zeros))
    return codes, scale * (codes.float() - zeros)


READERS = {"int": (read_with_library, read_with_own_decoder), "float": (read_floats_with_library, read_floats)}
"""Decoders of a linear by the type of its codes: with the library, and our own."""
