"""GGUF checkpoints, llama.cpp's single-file format: ggml blocks, tokenizer and metadata, with an Ollama Modelfile.

Each grid has at most one block type that stores it bit for bit; grids without one are refused before calibration.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source
from gptq_awq.export.folder import write_config
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack, unpack_codes
from gptq_awq.export.gguf_file import check_architecture, modelfile, read_gguf, vocabulary, write_gguf
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.grids.vectors import VectorGrid
from gptq_awq.models.offload import offloaded
from gptq_awq.runtime.options import checked_dataclass

FITS = "choose grid=q4_0, q8_0, q4_k_m or a related one in configs/grid, or sym=true group_size=32 with bits 4, 5 or 8"


@checked_dataclass
class GGUFFormat:
    """Export to a folder with `model.gguf`, an Ollama Modelfile and config.json.

    Attributes:
        plain_dtype: dtype of unquantized matrices: F16, BF16 or F32.
        pre: llama.cpp's name of the pre-tokenizer; None recognizes it by its content.
    """

    plain_dtype: Literal["F16", "BF16", "F32"] = "F16"
    pre: str | None = None
    name: str = "gguf"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:
        """Raise UserError for an architecture, a grid or a width that llama.cpp doesn't support."""
        check_architecture(config)
        for linear in linears:
            kind = ggml_type(linear.grid)
            if kind is None and getattr(linear.grid, "shared_by_tensor", False):
                raise UserError(
                    "export.formats=gguf: NVFP4's blocks hold no scale of the tensor; set grid.tensor_scale=1"
                )
            if kind is None:
                raise UserError(f"export.formats=gguf: llama.cpp has no block type for {linear.grid}; {FITS}")
            if not linear.natural_order:
                raise UserError(
                    "export.formats=gguf: groups must be neighbouring columns; set method.solver.static_groups=true "
                    "or method.solver.act_order=false"
                )
            block = BLOCK_TYPES[kind].block
            if linear.columns % block:
                raise UserError(
                    f"export.formats=gguf: {kind} takes multiples of {block} columns and {linear.name} has "
                    f"{linear.columns}; grid=q4_0 needs multiples of 32, grid=q4_k_m falls back as llama.cpp does"
                )

    def check_tokenizer(self, tokenizer: Any, rows: int) -> None:
        """Raise UserError for a tokenizer that llama.cpp can't reproduce; `rows` is the embedding's row count."""
        vocabulary(tokenizer, rows, self.pre)

    def write(self, source: Source, folder: Path) -> None:
        """Write model.gguf, its Modelfile, and the model's config.json, which the verifier needs."""
        path = folder / "model.gguf"
        with TemporaryDirectory(dir=folder, prefix=".packed-") as scratch:
            packed = _packed_to_disk(source, Path(scratch)) if offloaded(source.model) else _packed(source)
            write_gguf(path, source.model, source.tokenizer, packed, self.plain_dtype, {"name": source.name}, self.pre)
        (folder / "Modelfile").write_text(modelfile(path.name, source.tokenizer))
        write_config(source, folder, torch.float16, None)

    def decoder(self) -> str:
        """Name of the decoder: the gguf library decodes weights, our own bit-field tables decode codes."""
        return f"gguf {version('gguf')}"

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight, with rows in transformers' order."""
        for tensor in read_gguf(folder / "model.gguf"):
            if tensor.ggml_type in BLOCK_TYPES:
                codes = torch.from_numpy(unpack_codes(tensor.ggml_type, tensor.data))
                yield Decoded(tensor.name, codes, torch.from_numpy(tensor.weight))

    def plain(self, folder: Path) -> dict[str, Tensor]:
        """Unquantized tensors by their names in transformers."""
        tensors = {}
        for tensor in read_gguf(folder / "model.gguf"):
            if tensor.ggml_type not in BLOCK_TYPES:
                name = tensor.name if tensor.name.endswith(".bias") else f"{tensor.name}.weight"
                tensors[name] = torch.from_numpy(tensor.weight)
        return tensors


def ggml_type(grid: Grid) -> str | None:
    """Block type that stores a grid's codes and scales exactly; None where there is none."""
    if isinstance(grid, KGrid | VectorGrid):
        return grid.type.upper()
    if isinstance(grid, ScaledFloatGrid):
        return _float_type(grid)
    if isinstance(grid, TableGrid):
        return "IQ4_NL" if (grid.table, grid.group_size) == ("iq4_nl", 32) else None
    if getattr(grid, "scale_dtype", "float16") != "float16":
        return None
    if isinstance(grid, TernaryGrid):
        return {1.625: "TQ1_0", 2.0: "TQ2_0"}[grid.bits] if grid.group_size == 256 else None
    if grid.group_size != 32:
        return None
    if isinstance(grid, AffineGrid):
        return {4: "Q4_1", 5: "Q5_1"}.get(grid.bits)
    if isinstance(grid, SignedGrid) or (isinstance(grid, IntGrid) and grid.sym):
        return {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}.get(grid.bits)
    return None


def _float_type(grid: ScaledFloatGrid) -> str | None:
    """MXFP4, or NVFP4 without a scale of the tensor."""
    if (grid.element, grid.scale, grid.group_size) == ("e2m1", "e8m0", 32):
        return "MXFP4"
    without = grid.tensor_scale == 1
    return "NVFP4" if (grid.element, grid.scale, grid.group_size) == ("e2m1", "e4m3", 16) and without else None


def _packed(source: Source) -> dict[str, tuple[str, np.ndarray]]:
    """Module name → block type and bytes, packed in threads, as numpy releases the GIL in large copies."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = pool.map(pack_weight, source.weights.values())
        return dict(zip(source.weights, blocks, strict=True))


def _packed_to_disk(source: Source, folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Module name → block type and memory-mapped bytes, packed one weight at a time to bound memory."""
    packed = {}
    for number, (name, weight) in enumerate(source.weights.items()):
        kind, data = pack_weight(weight)
        np.save(folder / f"{number}.npy", data)
        packed[name] = kind, np.load(folder / f"{number}.npy", mmap_mode="r")
    return packed


def pack_weight(weight: QuantizedWeight) -> tuple[str, np.ndarray]:
    """Block type and packed bytes of one weight. Raises ValueError for a grid without block type."""
    kind = ggml_type(weight.grid)
    if kind is None or not weight.natural_order:
        raise ValueError(f"{weight.grid} has no ggml block type")
    return kind, pack(kind, weight.codes, weight.scales, weight.zeros, weight.store)
