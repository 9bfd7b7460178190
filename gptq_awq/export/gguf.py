"""GGUF checkpoints, llama.cpp's single-file format: ggml blocks, tokenizer and metadata, with an Ollama Modelfile.

Each grid has at most one block type that stores it bit for bit; grids without one are refused before calibration, and
so is a model that llama.cpp's converter doesn't know, or whose tokenizer llama.cpp would not reproduce.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, LinearSpec, Source
from gptq_awq.export.config import write_config
from gptq_awq.export.engine_check import check_engine
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack
from gptq_awq.export.gguf_converter import Vocabulary, converter_root, known_architectures
from gptq_awq.export.gguf_file import Packed, block_types, read_gguf, write_gguf
from gptq_awq.export.gguf_layout import observe, skeleton
from gptq_awq.export.gguf_projector import PROJECTOR, write_projector
from gptq_awq.export.gguf_tokenizer import ENGINE, vocabulary_for
from gptq_awq.export.layout import Layout, WholeTensor, quantized, unquantized
from gptq_awq.export.modelfile import modelfile
from gptq_awq.export.shortened import tried_in_part
from gptq_awq.export.text_part import text_linears, text_part, text_source
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.grids.vectors import VectorGrid
from gptq_awq.models.auto_class import also_sees
from gptq_awq.models.offload import offloaded
from gptq_awq.runtime.options import checked_dataclass

log = logging.getLogger(__name__)
FITS = "choose grid=q4_0, q8_0, q4_k_m or a related one in configs/grid, or sym=true group_size=32 with bits 4, 5 or 8"


@checked_dataclass
class GGUFFormat:
    """Export to a folder with `model.gguf`, an Ollama Modelfile, and config.json and layout.npz for the verifier.

    Attributes:
        plain_dtype: dtype of unquantized matrices: F16, BF16 or F32.
        pre: llama.cpp's name of the pre-tokenizer; None: as llama.cpp's converter or llama.cpp itself recognizes it.
        converter: checkout of llama.cpp whose converter is used; None: that of the pinned release.
        other_ids: what to do where llama.cpp's tokenizer gives other ids: refuse the model, or allow it and say so.
    """

    plain_dtype: Literal["F16", "BF16", "F32"] = "F16"
    pre: str | None = None
    converter: str | None = None
    other_ids: Literal["refuse", "allow"] = "refuse"
    name: str = "gguf"

    def check(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> None:  # noqa: ARG002 (check_model)
        """Raise UserError for a grid or a width that llama.cpp doesn't support."""
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

    def check_model(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> list[str]:
        """Raise UserError for a model, or a tokenizer, that llama.cpp or its converter doesn't take.

        Returns sentences on what the file will hold in another way than asked for.
        """
        if (shell := self._text(model)) is not model:
            linears, model = text_linears(linears, model, shell), shell
        with skeleton(model, tokenizer) as folder:
            layout = observe(converter_root(self.converter), folder, model)
            types = block_types(layout, {f"{linear.name}.weight": str(ggml_type(linear.grid)) for linear in linears})
            vocabulary, difference = self._vocabulary(folder, tokenizer)

        def tried() -> list[str]:
            return self._tried(model, tokenizer, vocabulary)

        untried = tried_in_part(model, f"{self.name}: llama.cpp", tried)
        names = [f"{linear.name}.weight" for linear in linears]
        return [difference] * bool(difference) + untried + layout.notes(types, names, self.name, "llama.cpp")

    def _tried(self, model: PreTrainedModel, tokenizer: Any, vocabulary: Vocabulary | None) -> list[str]:
        """Compare llama.cpp's distributions with the model's; see `check_engine`."""
        root = converter_root(self.converter)
        with skeleton(model, tokenizer) as folder:
            path, layout = folder / "model.gguf", observe(root, folder, model)

            def write() -> Mapping[str, QuantizedWeight]:
                options = {"dtype": "F32", "model_name": "", "vocabulary": vocabulary}
                write_gguf(path, root, folder, model, layout, {}, {}, options)
                return {}

            return check_engine(ENGINE, self.name, model, path, write, limit=1e-3)

    def _text(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model itself where the converter knows it, else its text part."""
        known = known_architectures(converter_root(self.converter))
        return text_part(model) if also_sees(model.config) and type(model).__name__.lower() not in known else model

    def stored(self, source: Source) -> Mapping[str, QuantizedWeight]:
        """Weights under the names that the file's layout has for them."""
        shell = self._text(source.model)
        return source.weights if shell is source.model else text_source(source, shell).weights

    def _vocabulary(self, folder: Path, tokenizer: Any) -> tuple[Vocabulary | None, str]:
        """The tokenizer's description in the file, and a sentence on where llama.cpp's ids differ."""
        if tokenizer is None:
            return None, ""
        allow = self.other_ids == "allow"
        return vocabulary_for(converter_root(self.converter), folder, tokenizer, self.pre, allow)

    def write(self, source: Source, folder: Path) -> None:
        """Write model.gguf, its Modelfile, layout.npz, and the model's config.json, which the verifier needs."""
        whole = source.model
        if (shell := self._text(whole)) is not whole:
            source = text_source(source, shell)
        path, model, root = folder / "model.gguf", source.model, converter_root(self.converter)
        with (
            skeleton(model, source.tokenizer) as files,
            TemporaryDirectory(dir=folder, prefix=".packed-") as scratch,
        ):
            packed = _packed_to_disk(source, Path(scratch)) if offloaded(model) else _packed(source)
            layout = observe(root, files, model)
            vocabulary, _ = self._vocabulary(files, source.tokenizer)
            options = {"dtype": self.plain_dtype, "model_name": source.name, "vocabulary": vocabulary}
            write_gguf(path, root, files, model, layout, packed, _exact(source, layout, packed), options).write(folder)
        if source.tokenizer is not None:
            text = modelfile(path.name, source.tokenizer, model.generation_config)
            (folder / "Modelfile").write_text(text)
        write_config(model, folder, torch.float16, None)
        if also_sees(whole.config) and (why := write_projector(folder / PROJECTOR, root, whole, self.plain_dtype)):
            log.warning("gguf: %s", why)

    def decoder(self) -> str:
        """Name of the decoder: the gguf library decodes weights, our own bit-field tables decode codes."""
        return f"gguf {version('gguf')}"

    def decode(self, folder: Path) -> Iterator[Decoded]:
        """Decode every quantized weight, with rows in transformers' order."""
        return quantized(folder, _read)

    def plain(self, folder: Path) -> dict[str, Tensor]:
        """Unquantized tensors by their names in transformers."""
        return unquantized(folder, _read)


def _read(folder: Path, layout: Layout) -> Iterator[WholeTensor]:
    return read_gguf(folder / "model.gguf", layout)


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


def _exact(source: Source, layout: Layout, packed: Packed) -> dict[str, Tensor]:
    """Dequantized values (out, in) of the quantized weights that can't be stored as blocks."""
    apart = layout.not_as_codes(block_types(layout, {name: kind for name, (kind, _) in packed.items()}), packed)
    return {name: source.weights[name.removesuffix(".weight")].dequantize().cpu() for name in apart}


def _packed(source: Source) -> dict[str, tuple[str, np.ndarray]]:
    """Weight's name → block type and bytes, packed in threads, as numpy releases the GIL in large copies."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = pool.map(pack_weight, source.weights.values())
        return dict(zip((f"{name}.weight" for name in source.weights), blocks, strict=True))


def _packed_to_disk(source: Source, folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Weight's name → block type and memory-mapped bytes, packed one weight at a time to bound memory."""
    packed = {}
    for number, (name, weight) in enumerate(source.weights.items()):
        kind, data = pack_weight(weight)
        np.save(folder / f"{number}.npy", data)
        packed[f"{name}.weight"] = kind, np.load(folder / f"{number}.npy", mmap_mode="r")
    return packed


def pack_weight(weight: QuantizedWeight) -> tuple[str, np.ndarray]:
    """Block type and packed bytes of one weight. Raises ValueError for a grid without block type."""
    kind = ggml_type(weight.grid)
    if kind is None or not weight.natural_order:
        raise ValueError(f"{weight.grid} has no ggml block type")
    return kind, pack(kind, weight.codes, weight.scales, weight.zeros, weight.store)
