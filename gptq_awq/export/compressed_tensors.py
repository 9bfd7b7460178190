"""compressed-tensors checkpoints: what llm-compressor writes, transformers and vLLM read.

A linear of `out` rows and `in` columns, codes of b bits, G groups of neighbouring columns:

    pack-quantized   weight_packed      (out, ⌈in·b/32⌉)  int32   each row's codes as a stream of bits
                     weight_zero_point  (⌈out·b/32⌉, G)   int32   each group's zeros down its column (asymmetric)
                     weight_shape       (2,)              int64
    int-quantized    weight             (out, in)         int8    codes less 128
                     weight_zero_point  (out, G)          int8    zeros less 128 (asymmetric)
    both             weight_scale       (out, G)

Linears on other grids than each other are in groups of their own in config.json, by name.

Streams without gaps for 3, 5, 6 and 7 bits are the library's since 0.18; before, it left a word's last bits free.
g_idx went out of the format with 0.19.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.folder import FolderTensors, read_config, write_folder
from gptq_awq.export.packing import (
    PRODUCER,
    exactly,
    int_grids,
    pack_words,
    require_linear_modules,
    require_natural_order,
    require_whole_groups,
    unpack_words,
    unquantized,
)
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid

FORMATS = {"pack": "pack-quantized", "int8": "int-quantized"}
DENSE_SINCE = (0, 18)
ALL = "Linear"
"""The target that is every linear: modules are named by class, too."""


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """A compressed-tensors folder, weights only (W2A16 to W8A16).

    Attributes:
        dtype: of scales and of what isn't quantized; float16, bfloat16 or float32.
        layout: pack, codes of any bits in 32-bit words, or int8, one byte a code (8 bits; transformers reads it,
            vLLM wants quantized activations with it).
        shard: largest file.

    Raises:
        UserError: a layout that there isn't.
    """

    dtype: str = "float16"
    layout: Literal["pack", "int8"] = "pack"
    shard: str = "4GB"
    name: str = "compressed_tensors"

    def __post_init__(self) -> None:
        if self.layout not in FORMATS:
            raise UserError(f"export.compressed_tensors.layout={self.layout}: choose pack or int8")

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError for grids, bits, orders or architectures that the format has no room for."""
        grids = int_grids(linears, self.name, self.dtype, ("float16", "bfloat16", "float32"))
        require_whole_groups(linears, self.name)
        require_natural_order(linears, self.name, " (g_idx left it in 0.19), or export.formats=[gptq]")
        other = next((grid.bits for grid in grids if grid.bits != 8), None)
        if self.layout == "int8" and other is not None:
            raise UserError(
                f"bits={other}: export.compressed_tensors.layout=int8 holds 8 bits; choose bits=8 or "
                "export.compressed_tensors.layout=pack"
            )
        require_linear_modules(config, self.name)

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where a parameter that isn't quantized overflows the dtype."""
        dtype, weights = torch_dtype(self.dtype, "export.compressed_tensors.dtype"), source.weights
        packer = pack if self.layout == "pack" else pack_int8
        packed = (
            (f"{name}.{part}", tensor)
            for name, weight in weights.items()
            for part, tensor in packer(weight, dtype).items()
        )
        grids = {name: weight.grid.without_search() for name, weight in weights.items()}
        config = quantization_config(grids, FORMATS[self.layout], unquantized(source))
        write_folder(source, folder, packed, dtype, config, self.shard)

    def decoder(self) -> str:
        """The library, where it is installed and reads streams without gaps; else our own reader."""
        return f"compressed-tensors {version('compressed-tensors')}" if library_reads() else PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Every quantized weight."""
        groups, tensors = read_config(folder)["quantization_config"]["config_groups"], FolderTensors(folder)
        by_target = {target: group for group in groups.values() for target in group["targets"]}
        read = read_with_library if library_reads() else read_alone
        for key in [key for key in tensors if key.endswith(".weight_scale")]:
            name = key.removesuffix(".weight_scale")
            parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
            yield Decoded(name, *read(parts, by_target.get(name) or by_target[ALL]))


PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point")


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear in pack-quantized, see the module's docstring.

    Raises:
        ValueError: scales that the dtype can't hold, which `check` refuses beforehand.
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
    """The tensors of one linear in int-quantized. Raises ValueError as `pack` does."""
    parts = {"weight": signed(weight.codes.cpu()), "weight_scale": exactly(weight.scales, dtype, "scales")}
    if not is_symmetric(weight):
        parts["weight_zero_point"] = signed(weight.zeros.cpu())
    return parts


def signed(codes: Tensor) -> Int[Tensor, "..."]:
    """Codes 0 to 255 as -128 to 127."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def is_symmetric(weight: QuantizedWeight) -> bool:
    """Whether zeros go without saying."""
    assert isinstance(weight.grid, IntGrid)
    return weight.grid.sym


def quantization_config(grids: Mapping[str, Grid], format_: str, ignore: Sequence[str]) -> dict[str, Any]:
    """As config.json holds it.

    Args:
        grids: by a linear's name; `IntGrid`s, searches aside.
        format_: pack-quantized or int-quantized.
        ignore: names of the linears that stay as they are.
    """
    named: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        named.setdefault(grid, []).append(name)
    # The format is said once more, as the library would guess pack-quantized where activations stay as they are.
    groups = {
        f"group_{number}": {
            "targets": [ALL] if len(named) == 1 else names,
            "weights": _weights(grid),
            "format": format_,
        }
        for number, (grid, names) in enumerate(named.items())
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }
    if format_ == FORMATS["pack"] and [group["weights"]["symmetric"] for group in groups.values()] == [False]:
        # An option of transformers, which else expects unpacked zeros (seen with compressed-tensors 0.15 to 0.20), and
        # which with it knows one group only.
        config["dequantize"] = True
    return config


def _weights(grid: Grid) -> dict[str, Any]:
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
    """Whether the library is installed, and packs as this file does."""
    try:
        major, minor = version("compressed-tensors").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= DENSE_SINCE


def read_with_library(parts: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Codes and weight of one linear, unpacked and dequantized by the library."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    scheme, bits = QuantizationScheme.model_validate(group), group["weights"]["num_bits"]
    # In float32, where the product of a code and a scale of 16 bits is exact.
    parts = parts | {"weight_scale": parts["weight_scale"].float()}
    compressor: Any = BaseCompressor.get_value_from_registry(group["format"])
    weight = compressor.decompress(parts, scheme)["weight"]
    if "weight_packed" not in parts:
        return (parts["weight"].int() + 128).to(torch.uint8), weight
    codes = unpack_from_int32(parts["weight_packed"], bits, torch.Size(parts["weight_shape"].tolist()))
    return (codes.int() + 2 ** (bits - 1)).to(torch.uint8), weight


def read_alone(parts: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same, from the bits of the words' bytes."""
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
