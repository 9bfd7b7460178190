"""Where llama.cpp's converter puts every tensor of a model: it is given tensors of numbered elements (placement.py)."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.alike import watched
from gptq_awq.export.config import read_config, write_config
from gptq_awq.export.folder import write_tokenizer
from gptq_awq.export.gguf_converter import conversion, converter_root, imported, is_pinned, refusing
from gptq_awq.export.layout import Layout, digits_of, kept_layout, numbered
from gptq_awq.export.placement import Runs
from gptq_awq.export.saved import SavedTensors
from gptq_awq.models.blocks import find_blocks
from gptq_awq.runtime.fingerprint import layout_sha256

BLOCK = re.compile(r"blk\.(\d+)\.")


@contextmanager
def skeleton(model: PreTrainedModel, tokenizer: Any) -> Iterator[Path]:
    """Context manager of a folder with all that the converter reads of a model, but its tensors."""
    with TemporaryDirectory(prefix="gguf-") as path:
        folder = Path(path)
        write_config(model, folder, torch.float32, None)
        config = json.loads((folder / "config.json").read_text())
        config.pop("auto_map", None)  # code of the folder that the model came from
        (folder / "config.json").write_text(json.dumps(config))
        if tokenizer is None:  # of which the converter looks at the files, too
            rows = len(model.get_input_embeddings().get_parameter("weight"))
            content = {"added_tokens": [], "model": {"vocab": {str(row): row for row in range(rows)}}}
            (folder / "tokenizer.json").write_text(json.dumps(content))
            (folder / "tokenizer_config.json").write_text("{}")
        else:
            write_tokenizer(tokenizer, folder)
        yield folder


def modules_by_tensor(model: PreTrainedModel) -> dict[str, list[str]]:
    """GGUF tensor, without ".weight" → modules whose weights it consists of: one, or experts in order.

    Raises:
        UserError: an architecture that llama.cpp's converter doesn't know.
    """
    with skeleton(model, None) as folder:
        layout = observe(converter_root(None), folder, model)
    parts = {tensor: layout.parts(tensor) for tensor in layout.runs if tensor.endswith(".weight")}
    return {
        tensor.removesuffix(".weight"): [part.name.removesuffix(".weight") for part in own]
        for tensor, own in parts.items()
    }


def observe(root: Path, folder: Path, model: PreTrainedModel) -> Layout:
    """Observe where the converter puts a model's tensors; what the pinned one does is kept in the cache.

    Args:
        root: the converter (converter_root).
        folder: folder with the model's config.json.
        model: model whose shapes count, not its values.

    Raises:
        UserError: an architecture or a tensor that the converter doesn't know.
    """
    if not is_pinned(root):
        return _observed(root, folder, model)
    name = layout_sha256(read_config(folder), numbered(model)[0].shapes, root.name)
    return kept_layout(name, lambda: _observed(root, folder, model))


def _observed(root: Path, folder: Path, model: PreTrainedModel) -> Layout:
    """The layout, by having the converter convert tensors of numbered elements."""
    numbering, flipped = numbered(model)
    given = [SavedTensors(model, digits_of(numbering, flipped, number)) for number in range(numbering.passes)]
    with imported(root) as package:
        passes = [_lazily(package, folder, tensors) for tensors in given]
        count = len(find_blocks(model)[1])

        def block_of(name: str) -> str | None:
            found = BLOCK.match(name)
            return found[1] if found and int(found[1]) < count else None

        def watch(blocks: Collection[str | None]) -> dict[str, Runs | None]:
            names = [name for name in passes[0] if block_of(name) in blocks]
            return {name: numbering.runs([_eager(each[name]) for each in passes]) for name in names}

        runs = watched(model, numbering, block_of, watch)
    placed = {name: found for name in passes[0] if (found := runs[name]) is not None}
    if not placed:
        raise UserError(
            f"export.formats=gguf: llama.cpp's converter leaves out all tensors of {type(model).__name__}; choose "
            "another format"
        )
    return Layout(numbering, placed, flipped=flipped)


def _lazily(package: Any, folder: Path, tensors: SavedTensors) -> dict[str, Any]:
    """GGUF tensor → its lazy array."""
    options = {"dtype": "F32", "out": folder / "unused", "model_name": "", "vocabulary": None}
    found: dict[str, Any] = {}
    instance = conversion(package, folder, tensors, tensors.meta, **options, config=tensors.config, exact=())
    instance.gguf_writer.add_tensor = lambda name, tensor, **_: found.__setitem__(name, tensor)
    with refusing():
        instance.prepare_tensors()
    return found


def _eager(array: Any) -> np.ndarray:
    return type(array).to_eager(array) if hasattr(array, "_meta") else np.asarray(array)
