"""MLX's affine format, for mlx-lm: ŵ = s c + b, codes of 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128 columns.

Tensors of a linear with `out` rows, `in` columns, codes of `bits` bits and G groups:

    weight (out, in·bits/32)  uint32   codes of each row, packed without gaps, lowest bit first
    scales (out, G)                    s
    biases (out, G)                    b: the grid's minimum, or -s z where the grid has a zero point z

A minimum is stored unchanged. -s z is exact in the dtype of s where z is a power of two (symmetric grids), and in
float32 for any z, as s has 11 significant bits and z at most 8. Then s c + b equals s (c - z) bit for bit.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source, torch_dtype
from gptq_awq.export.config import read_config
from gptq_awq.export.engine_check import check_engine, check_windows
from gptq_awq.export.folder import FolderTensors, stored, write_tensors
from gptq_awq.export.layout import (
    Flat,
    Layout,
    Part,
    WholeTensor,
    put_together,
    quantized,
    replacing_weights,
    unquantized,
)
from gptq_awq.export.mlx_floats import decode_floats, decode_floats_with_mlx, mode_of, pack_floats
from gptq_awq.export.mlx_layout import Conversion
from gptq_awq.export.mlx_options import options_for_mlx
from gptq_awq.export.packing import PRODUCER, exactly, pack_words, require_natural_order, unpack_words
from gptq_awq.export.placement import indices
from gptq_awq.export.shortened import tried_in_part
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.models.carried import carried_names
from gptq_awq.models.linear import matrix
from gptq_awq.runtime.options import ByteSize, Dtype, checked_dataclass
from gptq_awq.solvers.rtn import RTN

PARTS = ("weight", "scales", "biases")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DTYPES = ("float16", "bfloat16", "float32")
LIMIT = 1e-4
"""Largest mean KL in nats between a model with weights of 8 bits and what mlx-lm computes with them in float32."""


@checked_dataclass
class MLXFormat:
    """Export to a folder that mlx-lm loads, in MLX's affine format or its floating-point modes (mlx_floats.py).

    Attributes:
        dtype: dtype of scales, biases and unquantized parameters: float16, bfloat16, float32, or auto, the
            shortest that stores scales and biases exactly.
        shard: maximum size of a safetensors file.

    Raises:
        UserError: an unknown dtype.
    """

    dtype: Dtype | Literal["auto"] = "auto"
    shard: ByteSize = "4GB"
    name: str = "mlx"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:  # noqa: ARG002 (check_model)
        """Raise UserError for grids, bits, groups, widths or a dtype that the format can't store exactly."""
        require_natural_order(linears, self.name, " or method.solver.act_order=false")
        for linear in linears:
            _check_grid(linear.grid)
            _check_width(linear)
            self._check_dtype(linear.grid)

    def check_model(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> list[str]:  # noqa: ARG002
        """Raise UserError for a model that mlx-lm doesn't load, or computes otherwise: it runs one of 8 bits."""
        layout, names = Conversion.of(model).layout(), [f"{linear.name}.weight" for linear in linears]
        types = _types(layout, {linear.name: linear.grid for linear in linears})
        found = tried_in_part(model, f"{self.name}: mlx", partial(self._tried, linears, model))
        return found + layout.notes(types, names, self.name, "mlx-lm") + _left_out(model)

    def _tried(self, linears: Sequence[LinearSpec], model: PreTrainedModel) -> list[str]:
        """Compare mlx-lm's distributions with the model's; see `check_engine`."""
        with TemporaryDirectory(prefix="mlx-") as path:

            def write() -> Mapping[str, QuantizedWeight]:
                weights = _in_eight_bits(linears, model)
                replace(self, dtype="float32").write(Source(model, None, "", weights), Path(path))
                return weights

            check = partial(check_engine, "mlx", self.name, model, Path(path), write, LIMIT)
            return check() or check_windows(model, check, f"{self.name}: mlx")

    def _check_dtype(self, grid: Grid) -> None:
        """Raise UserError if the requested dtype can't store the grid's scales and biases exactly."""
        needed = exact_dtype(grid)
        if self.dtype not in ("auto", "float32", needed):
            raise UserError(
                f"export.mlx.dtype={self.dtype}: {_why(grid, needed)}; choose export.mlx.dtype={needed}"
                + (" or grid=affine" if isinstance(grid, IntGrid) and not grid.sym else "")
            )

    def stored_dtype(self, weights: Iterable[LinearSpec | QuantizedWeight]) -> str:
        """Name of the dtype of scales, biases and unquantized parameters."""
        return common_dtype([weight.grid for weight in weights]) if self.dtype == "auto" else self.dtype

    def write(self, source: Source, folder: Path) -> None:
        """Write the folder. Raises UserError where a parameter overflows the dtype."""
        dtype = torch_dtype(self.stored_dtype(source.weights.values()), "export.mlx.dtype")
        conversion = Conversion.of(source.model)
        layout = conversion.layout()
        types = _types(layout, {name: weight.grid for name, weight in source.weights.items()})
        weights = {f"{name}.weight": weight for name, weight in source.weights.items()}
        exact = {name: weights[name].dequantize().cpu() for name in layout.not_as_codes(types, weights)}

        @lru_cache(maxsize=1)  # a fused weight is split into several tensors, one after the other
        def packed(name: str) -> dict[str, Tensor]:
            return pack(weights[name], dtype)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in conversion.tensors(replacing_weights(source.model, exact)):
                if types.get(name, "F32") != "F32":
                    yield from _placed(name, layout.parts(name), packed, tensor.shape)
                else:
                    yield name, stored(name, tensor, torch.float32 if name in types else dtype)

        write_tensors(source, folder, tensors(), dtype, None, self.shard)
        layout.with_values(source.model, exact).write(folder)
        first = {name: layout.parts(name)[0].name for name, kind in types.items() if kind != "F32"}
        quantization = quantization_config(
            {name.removesuffix(".weight"): weights[of].grid for name, of in first.items()}
        )
        # mlx-lm reads `quantization`, the hub displays `quantization_config`.
        config = options_for_mlx(source.model.config, read_config(folder))
        config |= {"quantization": quantization, "quantization_config": quantization} if quantization else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def decoder(self) -> str:
        """Name of the decoder: MLX where it is installed, else our own reader."""
        return f"mlx {version('mlx')}" if _has_mlx() else PRODUCER

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight, in float32."""
        return quantized(folder, _read_folder)

    def plain(self, folder: Path) -> dict[str, Tensor]:
        """Unquantized tensors by their names in transformers."""
        return unquantized(folder, _read_folder)


def _types(layout: Layout, grids: Mapping[str, Grid]) -> dict[str, str]:
    """mlx-lm's tensors → bits, group and mode to store them in, or "F32"; `grids`: modules → their grids."""
    kinds = {f"{name}.weight": " ".join(map(str, _size(grid))) for name, grid in grids.items()}
    return layout.types(kinds, lambda name, _: layout.numbering.shapes[name][-1], "mlx-lm")


def _placed(
    name: str, parts: Sequence[Part], packed: Callable[[str], Mapping[str, Tensor]], shape: torch.Size
) -> Iterator[tuple[str, Tensor]]:
    """mlx-lm's tensors of one of its weights: packed rows of the model's weights, where its parts come from."""
    found: dict[str, Tensor] = {}
    for part in parts:
        starts, positions, lengths = (a // shape[-1] for a in (part.starts, part.positions, part.lengths))
        rows, places = (torch.from_numpy(indices(each, lengths)) for each in (starts, positions))
        for key, given in packed(part.name).items():
            whole = found.setdefault(key, given.new_empty(math.prod(shape[:-1]), given.shape[1]))
            whole.view(torch.uint8)[places] = given.view(torch.uint8)[rows]  # of types that torch can't index, too
    for key, whole in found.items():
        yield f"{name.removesuffix('weight')}{key}", whole.reshape(*shape[:-1], -1)


def _read_folder(folder: Path, layout: Layout) -> Iterator[WholeTensor]:
    """The model's tensors of a folder, decoded."""
    sizes, tensors = read_config(folder)["quantization"], FolderTensors(folder)
    packed = {key.removesuffix(".scales") for key in tensors if key.endswith(".scales")}

    def flat() -> Iterator[Flat]:
        for key in tensors:
            name, _, part = key.rpartition(".")
            if name not in packed or part not in PARTS:
                yield Flat(key, tensors[key].float().reshape(-1).numpy(), None)
            elif part == "weight":
                parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
                rows = {part: tensor.reshape(-1, tensor.shape[-1]) for part, tensor in parts.items()}
                codes, weight = _read(rows, sizes | sizes.get(name, {}))
                yield Flat(key, weight.reshape(-1).numpy(), codes.reshape(-1).numpy())

    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return put_together(flat(), layout, held * 8 // min(BITS))


def _left_out(model: PreTrainedModel) -> list[str]:
    """A sentence on tensors of the model's files that mlx-lm has no place for."""
    names = sorted(carried_names(model))
    left = f"mlx: {len(names)} tensors that transformers doesn't load are left out, such as {names[0]}" if names else ""
    return [left] * bool(left)


def _in_eight_bits(linears: Sequence[LinearSpec], model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Weights rounded to nearest in 8 bits, in the groups asked for where MLX has such; of linears that are there."""
    found, own = {}, dict(model.named_modules())
    for linear in (linear for linear in linears if linear.name in own):
        weight = matrix(model.get_submodule(linear.name))
        group = linear.grid.group_size if linear.grid.group_size in GROUPS else GROUPS[0]
        found[linear.name] = RTN().solve(weight.float().cpu(), None, AffineGrid(8, group)).quantized
    return found


def _read(parts: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode codes and weight of one linear, with MLX where it is installed."""
    bits, group, mode = sizes["bits"], sizes["group_size"], sizes.get("mode", "affine")
    if mode != "affine":
        return (decode_floats_with_mlx if _has_mlx() else decode_floats)(parts, bits, group, mode)
    return (_decode_with_mlx if _has_mlx() else _decode)(parts, bits, group)


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one linear into weight, scales and biases (layout in the module's docstring).

    Raises:
        UserError: `dtype` can't represent the scales or biases, as values overflow.
    """
    if mode_of(weight.grid) != "affine":
        return pack_floats(weight)
    scales, zeros = weight.scales.float(), weight.zeros.float()
    biases = zeros if weight.grid.arithmetic.kind == "minimum" else -scales * zeros
    try:
        return {
            "weight": pack_words(weight.codes.cpu(), stored_bits(weight.grid)).view(torch.uint32),
            "scales": exactly(scales, dtype, "scales"),
            "biases": exactly(biases, dtype, "biases"),
        }
    except ValueError as error:
        raise UserError(f"mlx: {error}; choose export.mlx.dtype=float32") from error


def stored_bits(grid: Grid) -> int:
    """Bits that a packed code takes: the bit length of the grid's largest code, 2 for ternary grids."""
    return grid.arithmetic.max_code.bit_length()


def exact_dtype(grid: Grid) -> str:
    """Shortest dtype that stores a grid's scales and biases exactly."""
    kept = getattr(grid, "scale_dtype", "float16")
    return "float32" if isinstance(grid, IntGrid) and not grid.sym else kept


def common_dtype(grids: Sequence[Grid]) -> str:
    """Shortest dtype that stores the scales and biases of all grids exactly; float32 where they differ."""
    needed = {exact_dtype(grid) for grid in grids}
    return needed.pop() if len(needed) == 1 else "float32"


def quantization_config(grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Build config.json's `quantization`: the most common settings, and per module name those that differ.

    mlx-lm leaves modules without scales in the file unquantized, whatever the settings say.
    """
    sizes = {name: _size(grid) for name, grid in grids.items()}
    if not sizes:
        return {}
    usual = max(set(sizes.values()), key=lambda size: (list(sizes.values()).count(size), size))
    others = {name: _entry(size) for name, size in sizes.items() if size != usual}
    return _entry(usual) | others


def _size(grid: Grid) -> tuple[int, int, str]:
    """Group size, bits and mode of a grid."""
    return grid.group_size, stored_bits(grid), mode_of(grid)


def _entry(size: tuple[int, int, str]) -> dict[str, Any]:
    return {"group_size": size[0], "bits": size[1], "mode": size[2]}


def _decode(parts: Mapping[str, Tensor], bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Decode codes bit by bit, and weights as s c + b with the product rounded before the sum."""
    words, scales, biases = parts["weight"].view(torch.int32), parts["scales"].float(), parts["biases"].float()
    codes = unpack_words(words, bits, scales.shape[1] * group)
    weight = codes.reshape(*scales.shape, group) * scales[..., None] + biases[..., None]
    return codes, weight.reshape(codes.shape)


def _decode_with_mlx(parts: Mapping[str, Tensor], bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Decode with MLX's dequantization in float32: weights, and codes as the weights for scale 1 and bias 0."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    words = mx.array(parts["weight"].numpy())
    scales, biases = (mx.array(parts[part].float().numpy()) for part in ("scales", "biases"))

    def expand(s: Any, b: Any) -> Tensor:
        dequantized = mx.dequantize(words, s, b, group_size=group, bits=bits, stream=mx.cpu)
        return torch.from_numpy(np.array(dequantized))

    return expand(mx.ones_like(scales), mx.zeros_like(biases)).to(torch.uint8), expand(scales, biases)


def _has_mlx() -> bool:
    return importlib.util.find_spec("mlx") is not None


def _check_grid(grid: Grid) -> None:
    """Raise UserError for a grid, bits or a scale dtype that MLX's affine format can't store."""
    if mode_of(grid) != "affine":
        return
    if not isinstance(grid, AffineGrid | IntGrid | SignedGrid | TernaryGrid):
        raise UserError(
            f"grid={grid.label}: mlx holds a scale and a bias per group; choose grid=affine, or grid=int with "
            "group_size=32, 64 or 128"
        )
    if stored_bits(grid) not in BITS:
        raise UserError(f"bits={grid.bits}: mlx packs {', '.join(map(str, BITS))} bits; choose bits=6 or bits=8")
    if isinstance(grid, IntGrid) and grid.scale_dtype == "float32":
        raise UserError("grid.scale_dtype=float32: -scale · zero would be rounded; choose grid.scale_dtype=float16")


def _check_width(linear: LinearSpec) -> None:
    """Raise UserError for a group size that MLX lacks or that doesn't divide the columns."""
    if mode_of(linear.grid) != "affine":  # whose grids check their own
        return
    fitting = [str(group) for group in GROUPS if linear.columns % group == 0]
    if not fitting:
        raise UserError(
            f"export.formats=mlx: groups are of 32, 64 or 128 columns, and {linear.name} has {linear.columns}; "
            "leave mlx out, export.formats=[hf] takes any width"
        )
    if linear.grid.group_size not in GROUPS:
        raise UserError(f"group_size={linear.grid.group_size}: mlx has groups of 32, 64 or 128; choose {fitting[-1]}")
    if linear.columns % linear.grid.group_size:
        raise UserError(
            f"group_size={linear.grid.group_size}: does not divide the {linear.columns} columns of {linear.name}, and "
            f"mlx has no shorter last group; choose group_size={' or '.join(fitting)}"
        )


def _why(grid: Grid, needed: str) -> str:
    if isinstance(grid, IntGrid) and not grid.sym:
        return "-scale · zero of an asymmetric grid is exact in float32 only"
    return f"the grid's scales are {needed}"
