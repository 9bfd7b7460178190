"""Config.json, in spellings that transformers reads alike and older readers know.

transformers 5 renames options, nests them anew, and leaves out those that its classes take for granted. Published
checkpoints don't, and mlx-lm, llama.cpp's converter, vLLM and transformers 4 ask by what was published.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.export.public import names_only

PLAIN = ("rope_theta", "partial_rotary_factor")
"""Options of rotary positions that were outside of `rope_scaling`."""
MAMBA = {"linear_attention": "mamba", "full_attention": "attention"}
"""Kinds of layers of models with Mamba's, and what those were called before transformers 5."""


def write_config(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, quantization_config: Mapping[str, Any] | None
) -> None:
    """Write config.json, with the checkpoint's dtype and `quantization_config`, and generation_config.json."""
    config = published_options(model.config) | {"architectures": [type(model).__name__]}
    config["dtype"] = None
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part |= dict.fromkeys(part.keys() & {"dtype", "torch_dtype"}, str(dtype).removeprefix("torch."))
    if (tied := _head_is_tied(model)) is not None:
        for part in (config, config.get("text_config")):  # readers differ in which of them they ask
            if isinstance(part, dict):
                part["tie_word_embeddings"] = tied
    config = names_only(config)  # such as _name_or_path, the folder that the model came from
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    config = _for_older_readers(model.config, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _head_is_tied(model: PreTrainedModel) -> bool | None:
    """Whether the output head's matrix is the embedding's; None where there is no head, or it shares another's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    if head.weight is getattr(embedding, "weight", None):
        return True
    sharing = sum(each is head.weight for _, each in model.named_parameters(remove_duplicate=False))
    return False if sharing == 1 else None


def _for_older_readers(config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a config, and of those within it, with the names and spellings that they had before."""
    inside = {name: getattr(config, name, None) for name, value in options.items() if isinstance(value, dict)}
    parts = {name: part for name, part in inside.items() if isinstance(part, PreTrainedConfig)}
    options |= {name: _for_older_readers(part, _own_options(part, options[name])) for name, part in parts.items()}
    aliases = {alias: options.get(own) for alias, own in type(config).attribute_map.items()}
    options = {alias: value for alias, value in aliases.items() if value is not None} | options
    return _read_alike(type(config), options, legacy_config(options))


def _own_options(config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a config without those of any config that are as they would be without being told.

    transformers 4 had none of them in parts of a config, and some classes refuse what they don't know (DBRX).
    """
    try:
        untold = type(config)().to_dict()
    except Exception:  # of a class that must be told some
        return options
    anyones = PreTrainedConfig().to_dict().keys() - {"model_type", "tie_word_embeddings"}
    return {key: value for key, value in options.items() if key not in anyones or untold.get(key) != value}


def _read_alike(cls: type[PreTrainedConfig], config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A config with those options of `more` that don't change what transformers reads, whichever way its class does.

    Classes with several kinds of layers, for example, may take `rope_scaling` for all of `rope_parameters`.
    """

    def read(options: dict[str, Any]) -> dict[str, Any]:
        return cls.from_dict(json.loads(json.dumps(options, default=str))).to_dict()

    expected, found = read(config), config
    for name in (name for name, value in more.items() if name not in config or config[name] != value):
        try:
            again = read(found | {name: more[name]})
        except Exception:  # of an option that its class refuses, which is left out
            continue
        if all(_holds(again.get(key), value) for key, value in expected.items() if key != name):
            found = found | {name: more[name]}
    return found


def _holds(found: Any, expected: Any) -> bool:
    """Whether an option has an expected value; maps may have a `type` beside it, as older readers call `rope_type`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        more = found.keys() - expected.keys() - {"type"}
        return not more and all(_holds(found.get(key), value) for key, value in expected.items())
    return found == expected


def published_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Options of a config, spelled as the folder that the model came from spells them where they are still the same.

    transformers 5 renames options and leaves out those that its classes take for granted; other readers don't.
    """
    now = config.to_dict()
    path = Path(getattr(config, "_name_or_path", None) or ".") / "config.json"
    if not path.is_file():
        return now
    try:
        read, _ = type(config).get_config_dict(path.parent)  # which knows how infinities are spelled
        source = {key: read[key] for key in json.loads(path.read_text()) if key in read}
        then = type(config).from_dict(copy.deepcopy(source)).to_dict()
    except Exception:  # of another model, or spelled for code that is not transformers'
        return now
    return now if source.get("model_type") != now.get("model_type") else now | _as_published(source, now, then)


def _as_published(source: dict[str, Any], now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """Options of `source`, which were read as `then`, where they are still the same `now`, but for a dtype."""
    found = {}
    for key, value in source.items():
        own, read = now.get(key), then.get(key, now.get(key))
        if key not in now or _without_dtypes(own) == _without_dtypes(read):
            found[key] = value
        elif isinstance(value, dict) and isinstance(own, dict) and isinstance(read, dict):
            found[key] = own | _as_published(value, own, read)
    return found


def _without_dtypes(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_dtypes(each) for key, each in value.items() if key not in ("dtype", "torch_dtype")}


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the options that other readers look for where transformers 4 had them.

    mlx-lm, llama.cpp's converter and transformers before 5 ignore `rope_parameters`, and would silently use a default
    base, or no scaling.
    """
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if rope.get("sliding_attention"):
        found["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    rope = rope.get("full_attention", rope) or {}  # None: such layers have no positions
    found |= {key: rope.get(key) for key in PLAIN}
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", *PLAIN}:  # such as mrope_section
        found["rope_scaling"] = rope | {"type": rope.get("rope_type", "default")}
    counted = _kinds_of_layers(config)  # whatever else a config says: transformers doesn't look
    if config.get("model_type") in ("gpt_neox", "cohere2"):
        found |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    found["n_ctx"] = config.get("n_positions")
    if config.get("multi_query") and not config.get("new_decoder_architecture", True):
        counted["num_kv_heads"] = 1
    layers = config.get("layer_types") or []
    if {"sliding_attention", "full_attention"} <= set(layers):
        found["sliding_window_pattern"] = layers.index("full_attention") + 1
    missing = {key: value for key, value in found.items() if value is not None and config.get(key) is None}
    return dict(config) | missing | counted


def _kinds_of_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options on which layers are of which kind, as they were before transformers 5."""
    kinds, found = config.get("mlp_layer_types") or [], {}
    for kind, rest, count in (("dense", "sparse", "first_k_dense_replace"), ("hash_moe", "moe", "num_hash_layers")):
        if kind in kinds or rest in kinds:
            found[count] = (*kinds, rest).index(rest)
    if any(key.startswith("mamba_") for key in config):
        for name in ("layer_types", "layers_block_type"):
            if isinstance(kinds := config.get(name), list):
                found[name] = [MAMBA.get(kind, kind) for kind in kinds]
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Parse a folder's config.json."""
    return json.loads((folder / "config.json").read_text())
