"""Tensors of a model's files that transformers has no place for, such as layers that predict further tokens.

They go into a checkpoint as they are in the source, so that an engine which knows them still finds them. Adapters and
old copies of buffers, which are computed, are no such tensors.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.models.checkpoint import placed
from gptq_awq.models.experts import experts_in
from gptq_awq.models.quantized_source import decoded, quantization_of
from gptq_awq.models.tensor_files import StoredTensor, stored_tensors

NOT_CARRIED = re.compile(r"(^|[._])(lora|loha|lokr|ia3|vera|dora|adapters?)([._]|$)|inv_freq|position_ids|masked_bias")


def carried_names(model: Any) -> dict[str, StoredTensor]:
    """The tensors that a model's own files hold beside it, by their names there; empty where those are gone."""
    folder = Path(str(getattr(model, "name_or_path", "") or "."))
    if not (folder / "config.json").is_file():
        return {}
    try:
        stored = decoded(stored_tensors(folder, "model.path"), quantization_of(folder), "model.path")
    except UserError:
        return {}
    stored = {name: tensor for name, tensor in stored.items() if tensor.file.suffix == ".safetensors"}
    names = {*model.state_dict(), *experts_in(model)}  # experts as linears have the place of the tensor they were
    own = {place.source for place in placed(model, stored) if place.target in names}
    return {name: tensor for name, tensor in stored.items() if name not in own and not NOT_CARRIED.search(name)}


def carried(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those tensors, one by one: plain ones as they are stored, and what came quantized decoded, in `dtype`."""

    def get(path: Path, name: str) -> Tensor:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensor(name)

    for name, tensor in carried_names(model).items():
        found = tensor.read(name, get)
        yield name, found if tensor.decode is None else found.to(dtype)
