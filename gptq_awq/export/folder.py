"""A transformers folder: safetensors in shards with an index, config, tokenizer, generation config."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.models.experts import experts_in, fused_tensors

SHARD = "4GB"
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_folder(
    source: Source,
    folder: Path,
    packed: Mapping[str, Tensor],
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any] | None,
    shard: str = SHARD,
    rename: Callable[[str], str] = str,
) -> None:
    """Write a model in which some weights are packed; experts that were fused, as the model's makers store them.

    Args:
        source: the model; its unpacked parameters are stored in `dtype`, tied ones once.
        folder: empty.
        packed: full names ("model.layers.0.mlp.up_proj.qweight") of the tensors that stand for the weights of
            `source.weights`, which are not stored themselves.
        dtype: of everything else that is a floating-point number, and of the model as config.json says it.
        quantization_config: as engines read it from config.json.
        shard: largest file.
        rename: a tensor's name in the model → in the file, where an engine knows it by another one.

    Raises:
        UserError: a parameter that `dtype` cannot hold (an overflow).
    """
    tensors = plain_tensors(source, dtype) | {name: tensor.contiguous() for name, tensor in packed.items()}
    if experts_in(source.model):
        tensors = revert_weight_conversion(source.model, fused_tensors(source.model, tensors))
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    write_config(source, folder, dtype, quantization_config)
    source.tokenizer.save_pretrained(folder)
    _copy_processor(source.model.name_or_path, folder)


def _copy_processor(origin: str | None, folder: Path) -> None:
    """What a model that also sees has beside its tokenizer, from the folder that it was loaded from."""
    if not origin:
        return
    for path in (Path(origin) / file for file in PROCESSOR):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def plain_tensors(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is not quantized, in `dtype`. Raises UserError on overflow."""
    quantized = {f"{name}.weight" for name in source.weights}
    tensors, seen = {}, set()
    for name, tensor in source.model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        known = key in seen
        seen.add(key)
        if name in quantized or known:  # tied weights are stored under their first name
            continue
        stored = tensor.detach().to("cpu", dtype) if tensor.is_floating_point() else tensor.detach().cpu()
        if not torch.isfinite(stored).all():
            raise UserError(f"{name} overflows {str(dtype).removeprefix('torch.')}: export it as bfloat16 or float32")
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)
    return tensors


def write_config(
    source: Source, folder: Path, dtype: torch.dtype, quantization_config: Mapping[str, Any] | None
) -> None:
    """config.json and generation_config.json."""
    config = source.model.config.to_dict()
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    # Readers older than transformers 5 look for rope_theta at the top, and silently take 10000 where it is missing.
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if source.model.generation_config is not None:
        source.model.generation_config.save_pretrained(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                tensors[name] = file.get_tensor(name)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())
