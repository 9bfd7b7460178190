"""Model card (README.md) of a checkpoint: provenance, results beside full precision, loading code and caveats."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

import gptq_awq
from gptq_awq.export.public import names_only
from gptq_awq.report import measured
from gptq_awq.report.escape import markdown, one_line


@dataclass(frozen=True)
class Usage:
    """Instructions to load one format with an engine, for the model card.

    Attributes:
        library: the hub's `library_name` of the engine.
        install: packages to install, as arguments of `pip install`.
        code: tested Python example; FOLDER stands for the checkpoint's folder.
        caveat: known limitation of the engine, "" for none.
        commands: lines for a shell, one for each engine that has such.
    """

    library: str
    install: str
    code: str
    caveat: str = ""
    commands: tuple[str, ...] = ()


_SERVE = ("vllm serve FOLDER",)
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))"""

_VLLM = """\
from vllm import LLM
print(LLM("FOLDER", dtype="float16").generate("Once upon a time")[0].outputs[0].text)"""

USAGE: Mapping[str, Usage] = {
    "gptq": Usage(
        "transformers",
        "gptqmodel",
        """\
from gptqmodel import GPTQModel
model = GPTQModel.load("FOLDER")
print(model.tokenizer.decode(model.generate("Once upon a time", max_new_tokens=32)[0]))""",
        "vLLM on a CPU takes 4 bits, symmetric, without act_order only.",
        _SERVE,
    ),
    "awq": Usage(
        "transformers",
        "vllm",
        _VLLM,
        'In a script, vLLM wants to be called below `if __name__ == "__main__":`.',
        _SERVE,
    ),
    "compressed_tensors": Usage("transformers", "transformers compressed-tensors", _TRANSFORMERS, commands=_SERVE),
    "gguf": Usage(
        "gguf",
        "xllamacpp",
        """\
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = "FOLDER/model.gguf"
answer = xllamacpp.Server(params).handle_completions({"prompt": "Once upon a time", "max_tokens": 32})
print(answer["choices"][0]["text"])""",
        "llama.cpp rounds activations too, so its logits differ from those of the same weights elsewhere.",
        (
            'llama-cli -m FOLDER/model.gguf -p "Once upon a time"',
            "ollama create NAME -f FOLDER/Modelfile && ollama run NAME",
        ),
    ),
    "mlx": Usage(
        "mlx",
        "mlx-lm (on Linux: 'mlx[cpu]' mlx-lm)",
        """\
from mlx_lm import generate, load
model, tokenizer = load("FOLDER")
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=32))""",
        commands=('mlx_lm.generate --model FOLDER --prompt "Once upon a time"',),
    ),
    "bnb": Usage("transformers", "transformers accelerate bitsandbytes", _TRANSFORMERS),
    "hf": Usage("transformers", "transformers", _TRANSFORMERS, "The weights are dequantized: no smaller than before."),
}


def model_card(
    row: Mapping[str, Any] | None, format_name: str, notes: Sequence[str], facts: Mapping[str, Any] | None = None
) -> str:
    """Render a checkpoint's README.md with the hub's front matter.

    Args:
        row: results row as in results.json; None before scoring.
        format_name: name of the format; without instructions to load it where USAGE has none.
        notes: sentences on how the checkpoint was verified and on its limitations.
        facts: the run's provenance: `model` (source, sha256, what it came quantized as), `calibration` (source,
            sha256), `method`, `grid`, `code`.
    """
    row, facts = dict(names_only(row or {})), dict(names_only(facts or {}))
    usage = USAGE.get(format_name)
    library = usage.library if usage else None
    parts = [
        f"---\n{_front_matter(row, format_name, library).to_yaml()}\n---",
        f"# {markdown(_title(row, facts))}, {format_name}",
        _provenance(row, facts),
        "## Results",
        _results(row, format_name) if row.get("metrics") else "Not scored.",
    ]
    if usage:
        parts += ["## Loading", f"    pip install {usage.install}", f"```python\n{usage.code}\n```"]
        parts += ["Or in a shell:\n\n" + "\n".join(f"    {line}" for line in usage.commands)] if usage.commands else []
    caveats = [*(markdown(note) for note in notes), *([usage.caveat] if usage and usage.caveat else [])]
    if caveats:
        parts += ["## Notes", "\n".join(f"- {note}" for note in caveats)]
    if row:
        parts += ["## The results row", f"```json\n{json.dumps(row, indent=1, default=str)}\n```"]
    return "\n\n".join(parts) + "\n"


def _front_matter(row: Mapping[str, Any], format_name: str, library: str | None) -> ModelCardData:
    method = row.get("method")
    tags = ["gptq_awq", "quantized", format_name.replace("_", "-"), *([method] if method else [])]
    base = ((row.get("config") or {}).get("model") or {}).get("id") or row.get("model")
    relation: dict[str, Any] = {"base_model": one_line(base), "base_model_relation": "quantized"} if base else {}
    return ModelCardData(
        library_name=library, pipeline_tag="text-generation", tags=list(dict.fromkeys(tags)), **relation
    )


def _title(row: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    method = row.get("method") or facts.get("method") or "quantized"
    model = row.get("model") or (facts.get("model") or {}).get("source") or "model"
    grid = row.get("grid") if row.get("grid") not in (None, "int") else None
    bits = f"{row['bits']:g} bits" if row.get("bits") is not None else None
    return f"{model}: " + ", ".join(part for part in (method, grid, bits) if part)


def _provenance(row: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Table of the known provenance: source model, method, grid, calibration data and code version."""
    model, tokens = facts.get("model") or {}, facts.get("calibration") or {}
    group = {None: None, -1: "per channel"}.get(row.get("group_size"), f"{row.get('group_size')} columns")
    known = {
        "made from": _with_hash(model),
        "which came as": model.get("quantized_source") or model.get("on_grid"),
        "method": row.get("method") or facts.get("method"),
        "grid": facts.get("grid") or row.get("grid"),
        "bits per weight": _number(row.get("bits_per_weight")) and f"{_number(row['bits_per_weight'])}, all included",
        "scales shared by": group,
        "inputs in scoring": row.get("act"),
        "calibration": _with_hash(tokens) or ("none" if "calibration" in facts else None),
        "made by": f"gptq_awq {gptq_awq.__version__}, code {str(facts.get('code', 'unknown'))[:12]}",
    }
    lines = [f"| {what} | {markdown(value)} |" for what, value in known.items() if value]
    return "\n".join(["| | |", "| :--- | :--- |", *lines])


def _with_hash(thing: Mapping[str, Any]) -> str | None:
    return f"{thing.get('source')} (sha256 {str(thing.get('sha256'))[:12]})" if thing else None


def _results(row: Mapping[str, Any], format_name: str) -> str:
    """Table of every metric in full precision and quantized, with the difference and its 95% confidence interval."""
    metrics = row["metrics"]
    lines = ["| metric | full precision | this checkpoint | difference [95%] |", "| :--- | ---: | ---: | ---: |"]
    for name in measured(metrics):
        full, value = _number(metrics.get(f"{name}/baseline")), _number(metrics[name])
        value += _interval(metrics.get(f"{name}/ci95"))
        lines.append(f"| {markdown(name)} | {full} | {value} | {_difference(metrics, name)} |")
    size = ((row.get("manifest") or {}).get("checkpoints") or {}).get(format_name, {}).get("size_bytes")
    if size and row.get("baseline_size_bytes"):
        full = row["baseline_size_bytes"]
        lines.append(
            f"| size, MB (16 bits; all files) | {full / 1e6:.1f} | {size / 1e6:.1f} | {size / full - 1:+.1%} |"
        )
    return "\n".join(lines)


def _difference(metrics: Mapping[str, Any], name: str) -> str:
    return _number(metrics.get(f"{name}/delta"), "+") + _interval(metrics.get(f"{name}/delta_ci95"), "+")


def _interval(limits: Sequence[float] | None, sign: str = "") -> str:
    return f" [{_number(limits[0], sign)}, {_number(limits[1], sign)}]" if limits else ""


def _number(value: float | str | None, sign: str = "") -> str:
    """Format a number to four significant digits; None gives "", strings that JSON uses for infinities pass through."""
    if value is None or isinstance(value, str):
        return markdown(value or "")
    return f"{value:{sign}.4g}"
