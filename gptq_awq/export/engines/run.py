"""Run inference engines on a checkpoint and compare their logits with ours.

Engines have conflicting dependencies, so each runs in its own interpreter (scripts/install_engine.py) as
`python -I programs/ENGINE.py MODEL FOLDER DTYPE`: it reads FOLDER/tokens.npy, int32 (windows, seqlen), and
writes FOLDER/logits.npy, float32 (windows, seqlen, vocabulary), and FOLDER/version.txt. As programs are named after
their engines, -I keeps their folder off the module path; programs therefore can't import this package.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.storage.assets import cache_dir

RECORD = "engine.json"
"""File that marks a complete environment; scripts/install_engine.py writes it last."""

PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT = 1800.0
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class FormatSupport:
    """Requirements and accuracy of an engine on one checkpoint format.

    Attributes:
        modules: Python modules that its interpreter must be able to import.
        dtype: default compute dtype.
        max_kl: largest KL divergence of a token, in nats, that rounding in that dtype explains, for engines that
            read no other file of the model to be judged by (measured with correct checkpoints of trained models with
            15M and 135M parameters).
    """

    modules: tuple[str, ...]
    dtype: str = "float32"
    max_kl: float = 1e-4


@dataclass(frozen=True)
class Engine:
    """An inference engine and the checkpoint formats that it loads.

    Attributes:
        formats: export format → how the engine runs it.
        standalone: whether it is more than Python modules that may be here, and so always needs its own environment.
        program: name of the file in programs/ that runs it, where it isn't the engine's.
        note: known limitations.
    """

    formats: Mapping[str, FormatSupport]
    standalone: bool = False
    program: str | None = None
    note: str = ""


ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        formats={
            "hf": FormatSupport(("transformers",)),
            "gguf": FormatSupport(("transformers", "gguf", "accelerate")),
            "compressed_tensors": FormatSupport(("transformers", "compressed_tensors")),
            "bnb": FormatSupport(("transformers", "bitsandbytes", "accelerate")),
        },
        note="expands all weights; bitsandbytes' own kernels, which round activations, run in dtypes but float32",
    ),
    "transformers4": Engine(
        formats={
            "hf": FormatSupport(("transformers",)),
            "compressed_tensors": FormatSupport(("transformers", "compressed_tensors")),
        },
        standalone=True,
        program="transformers",
        note="the last release before transformers 5, which reads other spellings of configs and tokenizers",
    ),
    "gptqmodel": Engine(
        formats={"gptq": FormatSupport(("gptqmodel",)), "awq": FormatSupport(("gptqmodel",))},
        note="2 to 8 bits; groups of 16, 32, 64, 128 or whole rows; awq computes in float16 whatever the dtype",
    ),
    "vllm": Engine(
        formats={
            "hf": FormatSupport(("vllm",)),
            "gptq": FormatSupport(("vllm",), "float16"),
            "awq": FormatSupport(("vllm",), "float16"),
            "compressed_tensors": FormatSupport(("vllm",), "float16"),
        },
        note="on a CPU 4 bits only; gptq symmetric, in natural order, groups of 32, 64, 128 or whole rows",
    ),
    "mlx": Engine(formats={"hf": FormatSupport(("mlx_lm",)), "mlx": FormatSupport(("mlx_lm",))}),
    "llamacpp": Engine(
        formats={"gguf": FormatSupport(())},
        standalone=True,
        note="weights expanded to float32 by its BLAS backend; its own kernels would round activations to 8 bits",
    ),
    "xllamacpp": Engine(
        formats={"gguf": FormatSupport(("xllamacpp",))},
        note="needs no compiler; rounds activations to 8 bits; one call per position, so a few tokens only",
    ),
}


@dataclass(frozen=True)
class EngineAnswer:
    """Logits that an engine computed from a checkpoint.

    Attributes:
        logits: (windows, seqlen, vocab) float32 logits.
        engine: name of the engine.
        version: version of the engine.
        seconds: wall time, including the start of the interpreter and loading the model.
    """

    logits: Float[Tensor, "windows seqlen vocab"] = field(repr=False)
    engine: str
    version: str
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Differences between our next-token distributions p and an engine's q.

    Attributes:
        max_abs: largest absolute difference of a logit after centering each position, as softmax is invariant to a
            constant per position and some engines return log probabilities.
        mean_kl, max_kl: mean and maximum over positions of KL(p‖q), in nats.
        ppl_ours, ppl_engine: perplexities of p and q.
    """

    max_abs: float
    mean_kl: float
    max_kl: float
    ppl_ours: float
    ppl_engine: float


def engines_folder() -> Path:
    """Folder of the engines' environments: $GPTQ_AWQ_ENGINES, or `engines` in the cache folder."""
    return Path(os.environ.get("GPTQ_AWQ_ENGINES") or cache_dir() / "engines")


def find(name: str, format_name: str | None = None) -> Path | None:
    """Find the interpreter that runs an engine: its own environment's, else this one if it has the modules.

    This interpreter needs the modules for `format_name`, or for all of the engine's formats if that is None. Returns
    None if the engine is not installed. Raises UserError for an unknown engine, or a format that it doesn't load.
    """
    needed = list(_engine(name).formats.values()) if format_name is None else [_support(name, format_name)]
    env = engines_folder() / name
    if (env / RECORD).is_file():
        return env / "bin" / "python"
    if _engine(name).standalone:
        return None
    modules = {module for support in needed for module in support.modules}
    return Path(sys.executable) if all(importlib.util.find_spec(module) for module in modules) else None


def engine_version(name: str) -> str:
    """Version of an installed engine: its environment's record, or else that of the package installed here."""
    record = engines_folder() / name / RECORD
    return record.read_text() if record.is_file() else version(name)


def answer(
    name: str,
    path: Path,
    tokens: Int[Tensor, "windows seqlen"],
    format_name: str,
    dtype: str | None = None,
    vocab: int | None = None,
    timeout: float = TIMEOUT,
) -> EngineAnswer:
    """Compute an engine's logits at every position of every window.

    Args:
        name: key of ENGINES.
        path: checkpoint folder, or GGUF file.
        tokens: windows of token ids.
        format_name: format of the checkpoint.
        dtype: compute dtype, "float32", "float16" or "bfloat16"; None for the engine's default.
        vocab: vocabulary size of the model; logits that an engine pads beyond it are dropped.
        timeout: time limit in seconds.

    Raises:
        UserError: the engine is not installed, exceeds the time limit, refuses the checkpoint, or computes NaN.
    """
    python = find(name, format_name)
    if python is None:
        raise UserError(f"engine {name} is not installed: python scripts/install_engine.py {name}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:
        folder = Path(scratch)
        np.save(folder / "tokens.npy", tokens.to(torch.int32).cpu().numpy())
        program = PROGRAMS / f"{_engine(name).program or name}.py"
        command = [python, "-I", program, path.resolve(), folder, dtype or _support(name, format_name).dtype]
        _run(name, path, [str(part) for part in command], timeout)
        logits = torch.from_numpy(np.load(folder / "logits.npy"))[..., :vocab]
        found = (folder / "version.txt").read_text()
    if not logits.isfinite().all():
        raise UserError(f"{name} {found} computes NaN or infinite logits from {path}: try another dtype")
    return EngineAnswer(logits, name, found, time.monotonic() - started)


def tokenize(
    name: str, path: Path, texts: Mapping[str, Sequence[int]], pre: Sequence[str | None], timeout: float = TIMEOUT
) -> list[list[list[int]] | None]:
    """Tokenize texts with an engine, with one pre-tokenizer after the other (None: the file's own).

    Args:
        name: key of ENGINES.
        path: GGUF file.
        texts: text → ids that it should have; no further pre-tokenizer is tried once all have theirs.
        pre: llama.cpp's names of pre-tokenizers.
        timeout: time limit in seconds.

    Returns:
        Ids of all texts for each pre-tokenizer that was tried; None where the engine refuses it.

    Raises:
        UserError: the engine is not installed, or exceeds the time limit.
    """
    python = find(name, "gguf")
    if python is None:
        raise UserError(f"engine {name} is not installed: python scripts/install_engine.py {name}")
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:
        folder = Path(scratch)
        (folder / "texts.json").write_text(
            json.dumps({"texts": list(texts), "wanted": list(texts.values()), "pre": list(pre)})
        )
        command = [python, "-I", PROGRAMS / f"{name}.py", path.resolve(), folder, "-"]
        _run(name, path, [str(part) for part in command], timeout)
        return json.loads((folder / "ids.json").read_text())


def compare(
    ours: Float[Tensor, "windows seqlen vocab"],
    theirs: Float[Tensor, "windows seqlen vocab"],
    tokens: Int[Tensor, "windows seqlen"],
) -> Comparison:
    """Compare two models' logits on the same windows, in float64.

    Differences and KL cover all positions, perplexities those whose next token is in the window. Raises ValueError
    where shapes differ, such as the vocabulary size.
    """
    if ours.shape != theirs.shape or ours.shape[:2] != tokens.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (ours, theirs, tokens))
        raise ValueError(f"ours, the engine's logits and tokens don't match: {shapes}")
    max_abs, kl, nll_ours, nll_theirs = 0.0, [], [], []
    targets = tokens.long().roll(-1, dims=1)  # the last column has no successor, and is dropped below
    spans = [slice(i, i + POSITIONS_AT_ONCE) for i in range(0, tokens.shape[1], POSITIONS_AT_ONCE)]
    for span in spans:
        a, b, target = ours[:, span].double(), theirs[:, span].double(), targets[:, span, None]
        difference = a - b
        max_abs = max(max_abs, (difference - difference.mean(-1, keepdim=True)).abs().max().item())
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        nll_ours.append(-log_p.gather(-1, target)[..., 0])
        nll_theirs.append(-log_q.gather(-1, target)[..., 0])
    each = torch.cat(kl, 1).clamp(min=0)  # rounding can leave -1e-17
    ppl_ours, ppl_theirs = (torch.cat(nll, 1)[:, :-1].mean().exp().item() for nll in (nll_ours, nll_theirs))
    return Comparison(max_abs, each.mean().item(), each.max().item(), ppl_ours, ppl_theirs)


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise UserError(f"engine {name}: choose from {', '.join(ENGINES)}")
    return ENGINES[name]


def _support(name: str, format_name: str) -> FormatSupport:
    formats = _engine(name).formats
    if format_name not in formats:
        raise UserError(f"engine {name} does not take {format_name}: it takes {', '.join(formats)}")
    return formats[format_name]


def _run(name: str, path: Path, command: list[str], timeout: float) -> None:
    """Run an engine's program; raises UserError with the reason on failure or timeout."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{name} did not answer for {path} within {timeout:.0f} s: give it fewer windows") from error
    if done.returncode:
        raise UserError(f"{name} refuses {path}: {_reason(done.stderr, done.returncode)}")


def _reason(stderr: str, code: int) -> str:
    """Reason of a program's failure, on one line: its exception, else its signal, last line or exit code."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if re.match(r"(\[rank0\]: )?[\w.]*(Error|Exception)\b", line)]
    if raised:
        message = " ".join(line.strip() for line in lines[raised[-1] :])
        return textwrap.shorten(re.sub(r"\[type=.*", "", message), 400)  # pydantic appends its input there
    if code < 0:
        return f"killed by signal {-code}"
    return textwrap.shorten(lines[-1], 400) if lines else f"exit code {code}"
