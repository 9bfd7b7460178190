"""Hashes of all that a number depends on: content, options, the code that computes it, versions of packages.

Whatever is computed once and kept (a run, moments, factors, baselines, lm-eval answers, sensitivities, written text,
token ids) is named by one of the functions of this module, and by nothing else. Each hashes

    content    weights, windows with their shape, what encodes text, generation config: by value, wherever they lie
    options    the objects that compute, by class and fields
    code       the source of the modules that compute it, and of all of this package that these import
    packages   versions of the packages that this code runs on

so that one thing changed is another name, and a change that nothing kept depends on leaves the name as it is.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from gptq_awq.runtime.declarations import PACKAGE
from gptq_awq.runtime.source import Code, package_versions

NOT_COMPUTED = (
    *("out", "tracking", "resume", "profile", "objective", "ranks_timeout_minutes", "cache_gb"),
    *("activations", "memory_budget", "stream", "forecast", "time_budget", "recipes"),
    *("tables", "dry_run"),
)
"""Options that change no number."""
BUDGET = ("budget", "budget_bits", "budget_bytes", "budget_uniform", "tie", "allocated")
"""Fields of a grid that choose among widths by what each costs, and change no cost."""
COMPUTED_BY = {
    "observations": ("gptq_awq.calibration.block_inputs", "gptq_awq.models.load"),
    "baseline": ("gptq_awq.evaluation.baseline", "gptq_awq.models.load"),
    "floor": ("gptq_awq.evaluation.floor", "gptq_awq.models.load"),
    "answers": ("gptq_awq.evaluation.harness", "gptq_awq.models.load"),
    "sensitivities": ("gptq_awq.allocation.sensitivity", "gptq_awq.models.load"),
    "output curvature": ("gptq_awq.calibration.output_curvature", "gptq_awq.models.load"),
    "written text": ("gptq_awq.calibration.self_calibration", "gptq_awq.models.load"),
    "token ids": ("gptq_awq.data.tokens",),
    "layout": ("gptq_awq.export.gguf_layout", "gptq_awq.export.mlx_layout"),
    "vocabulary": ("gptq_awq.export.gguf_tokenizer",),
}
"""Modules that compute what the cache keeps, by its kind."""
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|generation_config|spiece|sentencepiece).*"
    r"|.*\.(model|tiktoken|jinja)"
)


# ------------------------------------------------------------------------------------------------------------- names


def run_sha256(config: Mapping[str, Any], data: Mapping[str, Any], code: str) -> str:
    """Hash of what a run computes: its config, the content of its data, the code and the packages it runs on.

    Two runs of one hash give the same numbers, whatever their folders are called.
    """
    return _json_sha256({"config": config_sha256(config), "data": data, "code": code, "packages": package_versions()})


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of the resolved config, without what changes no number."""
    relevant = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    return _json_sha256(relevant)


def observations_sha256(
    model: Any,
    model_sha256: str,
    tokens_sha256: str,
    dtype: Any,
    tokens_per_batch: int,
    transforms: Iterable[Any] = (),
    experts: Any = None,
) -> str:
    """Hash that names observations of the full-precision model: each block's sites and moments.

    Args:
        model: a causal LM.
        model_sha256: hash of the model's weights.
        tokens_sha256: hash of the calibration windows.
        dtype: dtype that forwards compute in.
        tokens_per_batch: calibration tokens per forward.
        transforms: transforms of the whole model, applied before it is observed.
        experts: policy for experts that few tokens reach; None: the default one.
    """
    transforms = list(transforms)
    content = {
        "model": _identity(model, model_sha256),
        "tokens": tokens_sha256,
        "dtype": str(dtype),
        "tokens_per_batch": tokens_per_batch,
        "transforms": described(transforms),
        "experts": described(experts),
    }
    return _computed_sha256("observations", content, transforms)


def factor_sha256(hessian: Any, damping: float, act_order: bool) -> str:
    """Hash that names the factor of one H beside its observations, whose name has the code: of H itself, by value."""
    content = {"hessian": tensor_sha256(hessian), "damping": damping, "act_order": act_order}
    return _json_sha256(content)


def baseline_sha256(model: Any, model_sha256: str, tokens_sha256: str, dtype: Any) -> str:
    """Hash that names the full-precision scores of windows of tokens, computed in `dtype`."""
    content = {"model": _identity(model, model_sha256), "tokens": tokens_sha256, "dtype": str(dtype)}
    return _computed_sha256("baseline", content)


def floor_sha256(model: Any, model_sha256: str, tokens_sha256: str, dtype: Any) -> str:
    """Hash that names the noise floor of `dtype` on windows of tokens."""
    content = {"model": _identity(model, model_sha256), "tokens": tokens_sha256, "dtype": str(dtype)}
    return _computed_sha256("floor", content)


def answers_sha256(model: Any, model_sha256: str, tokenizer: Any, dtype: Any) -> str:
    """Hash that names a model's lm-eval answers, which are kept by the hash of each request beneath it."""
    content = {
        "model": _identity(model, model_sha256),
        "encoding": encoding_sha256(tokenizer),
        "generation": generation_sha256(model),
        "dtype": str(dtype),
    }
    return _computed_sha256("answers", content)


def sensitivities_sha256(observations: str, grid: Any, solver: Any, seed: int, threads: int) -> str:
    """Hash that names what rounding each linear costs, on the full-precision inputs of `observations`."""
    choices = {name: value for name, value in described(grid)["is"].items() if name not in BUDGET}
    content = {
        "observations": observations,
        "grid": choices,
        "solver": described(solver),
        "seed": seed,
        "threads": threads,
    }
    return _computed_sha256("sensitivities", content, [grid, solver])


def curvature_sha256(
    model: Any, model_sha256: str, tokens_sha256: str, settings: Any, dtype: Any, transforms: Iterable[Any] = ()
) -> str:
    """Hash that names the output-side curvature of a model's linears: of the passes that gather it, not of its use."""
    transforms = list(transforms)
    content = {
        "model": _identity(model, model_sha256),
        "tokens": tokens_sha256,
        "settings": {name: getattr(settings, name) for name in ("draws", "rows", "seed")},
        "dtype": str(dtype),
        "transforms": described(transforms),
    }
    return _computed_sha256("output curvature", content, transforms)


def written_sha256(model: Any, model_sha256: str, tokens_sha256: str, writer: Any, dtype: Any) -> str:
    """Hash that names calibration text that the model writes: `writer` begins each window with some of the tokens."""
    content = {
        "model": _identity(model, model_sha256),
        "generation": generation_sha256(model),
        "tokens": tokens_sha256,
        "writer": described(writer),
        "dtype": str(dtype),
    }
    return _computed_sha256("written text", content, [writer])


def layout_sha256(config: Mapping[str, Any], shapes: Mapping[str, Any], converter: str) -> str:
    """Hash that names where a converter puts a model's tensors: of its config and shapes, not its values."""
    return _computed_sha256("layout", {"config": config, "shapes": shapes, "converter": converter})


def vocabulary_sha256(folder: Path, wanted: Mapping[str, Any], given: Any, converter: str, engine: str) -> str:
    """Hash that names how an engine tokenizes: of a folder's files, the ids that texts should have, and versions."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    content = {"files": files, "wanted": wanted, "given": described(given), "converter": converter, "engine": engine}
    return _computed_sha256("vocabulary", content)


def token_ids_sha256(text: str, tokenizer: Any) -> str:
    """Hash that names the token ids of a text."""
    content = {"text": hashlib.sha256(text.encode()).hexdigest(), "encoding": encoding_sha256(tokenizer)}
    return _computed_sha256("token ids", content)


# ----------------------------------------------------------------------------------------------------------- content


def encoding_sha256(tokenizer: Any) -> str:
    """Hash of all by which a tokenizer turns text into ids and back: its backend, its special tokens, its class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = ("add_bos_token", "add_eos_token", "split_special_tokens", "clean_up_tokenization_spaces")
    content = {
        "class": _qualified(type(tokenizer)),
        "backend": _vocabulary(tokenizer) if backend is None else _backend(backend),
        "special": {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()},
        "settings": {name: getattr(tokenizer, name, None) for name in names},
    }
    return _json_sha256(content)


def export_sha256(model: Any, tokenizer: Any) -> str:
    """Hash of what a checkpoint holds beside weights: tokenizer, its files, chat template, generation config."""
    settings = getattr(tokenizer, "init_kwargs", {})
    names = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
    folder = Path(getattr(tokenizer, "name_or_path", None) or "/nowhere")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    content = {
        "encoding": encoding_sha256(tokenizer),
        "chat_template": getattr(tokenizer, "chat_template", None),
        "settings": {name: settings.get(name) for name in names},
        "generation": generation_sha256(model),
        "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if _of_tokenizer(f)},
    }
    return _json_sha256(content)


def generation_sha256(model: Any) -> str:
    """Hash of a model's generation config, which says when and how it ends what it writes."""
    config = getattr(model, "generation_config", None)
    content = {} if config is None else config.to_dict()
    return _json_sha256({key: value for key, value in content.items() if key != "transformers_version"})


def tensor_sha256(x: Any) -> str:
    """Hash of a tensor: dtype, shape and values."""
    import torch  # takes seconds, which whoever hashes a config only need not spend

    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(value: Any) -> Any:
    """Description of an option or object by its class and fields, as JSON values; addresses in memory are in none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(described(each), sort_keys=True) for each in value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _qualified(value)
    if hasattr(value, "untyped_storage"):
        return tensor_sha256(value)
    if is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        own = getattr(value, "__dict__", None)
    known = str(value) if own is None else {name: described(each) for name, each in sorted(own.items())}
    return {"class": _qualified(type(value)), "is": known}


def _identity(model: Any, model_sha256: str) -> dict[str, Any]:
    """All of a model that its outputs depend on: weights, precision, device, structure, attention, CPU's products."""
    from gptq_awq.kernels import rank_k

    parameter = next(model.parameters())
    structure = hashlib.sha256()
    for name, module in model.named_modules():  # fused experts sum in another order than linears
        structure.update(f"{name} {_qualified(type(module))}\n".encode())
    device = parameter.device.type
    return {
        "weights": model_sha256,
        "dtype": str(parameter.dtype),
        "device": device,
        "attention": getattr(model.config, "_attn_implementation", None),
        "structure": structure.hexdigest(),
        "native_bfloat16": rank_k.available() if device == "cpu" else None,
    }


def _backend(backend: Any) -> str:
    """Hash of a fast tokenizer; truncation and padding, which lie first, are what the last call asked for."""
    _, key, rest = backend.to_str().partition('"added_tokens"')
    return hashlib.sha256((key + rest).encode()).hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """Hash of a tokenizer without backend: its vocabulary, and the files that it was made from."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items()), default=str).encode())
    for name in sorted(getattr(tokenizer, "vocab_files_names", {})):
        path = Path(getattr(tokenizer, name, None) or "/nowhere")
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _of_tokenizer(path: Path) -> bool:
    return path.is_file() and _TOKENIZER_FILES.fullmatch(path.name) is not None


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _computed_sha256(kind: str, content: Mapping[str, Any], objects: Iterable[Any] = ()) -> str:
    """Hash of what is computed of `content` by the modules of its kind, and by those that the objects' classes lie in.

    An installed package of the user's, such as a solver's, counts with its version.
    """
    modules = [type(each).__module__ for each in objects if each is not None]
    code = Code.of([*COMPUTED_BY[kind], *modules])
    packages = code.packages() | package_versions({m.partition(".")[0] for m in modules} - {PACKAGE.name, "builtins"})
    return _json_sha256({"kind": kind, "content": content, "code": code.sha256(), "packages": packages})


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
