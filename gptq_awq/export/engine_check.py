"""Whether an engine computes what a model computes, tried before calibration with the model as it came.

Engines have graphs of their own. What a config asks for beyond them (another rope scaling, caps left out, windows,
routers that don't normalize) they ignore without a word, so the only proof is to run one and compare distributions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.engines import answer, compare, find
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.models.linear import matrix
from gptq_awq.models.offload import offloaded

LARGEST = 2_000_000_000
"""Parameters of the largest model that is tried: a float32 file of it takes 8 GB for a while."""
TOKENS = 40
LIMIT_16_BITS = 3e-2
"""Largest mean KL in nats where the model in memory computes in 16 bits itself."""


@torch.no_grad()
def check_engine(
    engine: str,
    format_name: str,
    model: PreTrainedModel,
    path: Path,
    write: Callable[[], Mapping[str, QuantizedWeight]],
    limit: float,
) -> list[str]:
    """Compare an engine's distributions with the model's, on one window of random tokens.

    Args:
        engine: key of ENGINES.
        format_name: format of the file or folder.
        model: full-precision model.
        path: where `write` writes a checkpoint of it.
        write: writes the checkpoint, and returns the weights that it holds in place of the model's own.
        limit: largest mean KL in nats, of a model in float32.

    Returns:
        A sentence where it was not tried.

    Raises:
        UserError: the engine refuses the checkpoint, or computes something else.
    """
    if find(engine, format_name) is None or offloaded(model) or too_large(model):
        why = "the model is too large" if find(engine, format_name) else f"{engine} is not installed"
        return [f"{format_name}: not tried in {engine} before calibration, as {why}"]
    weights = write()
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(3, rows - 1), rows, (1, TOKENS), generator=draw)
    with _holding(model, weights):
        ours = model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()
    try:
        theirs = answer(engine, path, tokens, format_name, vocab=ours.shape[-1]).logits
    except UserError as error:
        reason = str(error).replace(f" {path}", f" this {type(model).__name__}")
        raise UserError(f"export.formats={format_name}: {reason}; choose another format, such as hf") from error
    found = compare(ours, theirs, tokens)
    if found.mean_kl > (limit if model.dtype == torch.float32 else LIMIT_16_BITS):
        raise UserError(
            f"export.formats={format_name}: {engine} computes something else from this {type(model).__name__} (mean KL "
            f"{found.mean_kl:.2g}): its graph has no such option as the config asks for; choose another format"
        )
    return []


def too_large(model: PreTrainedModel) -> bool:
    """Whether a model is not tried, for its size."""
    return sum(parameter.numel() for parameter in model.parameters()) > LARGEST


def check_windows(model: PreTrainedModel, check: Callable[[], list[str]], told: str) -> list[str]:
    """A sentence, beginning with `told`, where an engine ignores windows longer than what `check_engine` compares.

    Args:
        model: full-precision model; for a while it has sliding windows of half those tokens.
        check: calls `check_engine` for the model as it is then.
        told: format and engine, for the sentence.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= TOKENS:
        return []
    config.sliding_window = TOKENS // 2
    try:
        check()
    except UserError:
        return [f"{told} ignores the sliding window of {window} tokens, and computes others beyond it"]
    finally:
        config.sliding_window = window
    return []


@contextmanager
def _holding(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Context manager inside of which a model has other weights."""
    own = {name: matrix(model.get_submodule(name)) for name in weights}
    kept = {name: weight.clone() for name, weight in own.items()}
    try:
        for name, weight in own.items():
            weight.copy_(weights[name].dequantize())
        yield
    finally:
        for name, weight in own.items():
            weight.copy_(kept[name])
