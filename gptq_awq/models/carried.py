"""Tensors of a model's files that transformers has no place for, such as layers that predict further tokens.

They go into a checkpoint as they are in the source, so that an engine which knows them still finds them. Adapters and
old copies of buffers, which are computed, are no such tensors. Nor are tensors that read what a transform has changed:
all of them after a rotation, and those within a block whose norms absorbed scales.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.checkpoint import placed
from gptq_awq.models.experts import experts_in
from gptq_awq.models.quantized_source import decoded, quantization_of
from gptq_awq.models.tensor_files import StoredTensor, stored_tensors

NOT_CARRIED = re.compile(r"(^|[._])(lora|loha|lokr|ia3|vera|dora|adapters?)([._]|$)|inv_freq|position_ids|masked_bias")


def mark_changed(model: nn.Module, whole: bool, blocks: bool) -> None:
    """Mark a model, or each of its blocks, as one that computes in another basis than its files."""
    _, own = find_blocks(model)
    for module in [model] * whole + [*own] * blocks:
        module.basis_changed = True  # pyright: ignore[reportArgumentType]


def carried_names(model: Any) -> dict[str, StoredTensor]:
    """The tensors that a model's own files hold beside it, by their names there; empty where those are gone."""
    return {name: tensor for name, (tensor, valid) in _beside(model).items() if valid}


def outdated_names(model: Any) -> list[str]:
    """Names of the tensors that the files hold beside the model, and that a transform has made useless."""
    return [name for name, (_, valid) in _beside(model).items() if not valid]


def _beside(model: Any) -> dict[str, tuple[StoredTensor, bool]]:
    """The tensors beside the model, and whether what they read is in the basis of the files."""
    folder = Path(str(getattr(model, "name_or_path", "") or "."))
    if not (folder / "config.json").is_file():
        return {}
    try:
        stored = decoded(stored_tensors(folder, "model.path"), quantization_of(folder), "model.path")
    except UserError:
        return {}
    stored = {name: tensor for name, tensor in stored.items() if tensor.file.suffix == ".safetensors"}
    names = {*model.state_dict(), *experts_in(model)}  # experts as linears have the place of the tensor they were
    targets = {place.source: place.target for place in placed(model, stored)}
    prefix, blocks = find_blocks(model)
    changed = [f"{prefix}.{i}." for i, block in enumerate(blocks) if getattr(block, "basis_changed", False)]
    changed += [""] if getattr(model, "basis_changed", False) else []
    return {
        name: (tensor, not targets[name].startswith(tuple(changed)))
        for name, tensor in stored.items()
        if targets[name] not in names and not NOT_CARRIED.search(name)
    }


def carried(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those tensors, one by one: plain ones as they are stored, and what came quantized decoded, in `dtype`."""

    def get(path: Path, name: str) -> Tensor:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensor(name)

    for name, tensor in carried_names(model).items():
        found = tensor.read(name, get)
        yield name, found if tensor.decode is None else found.to(dtype)
