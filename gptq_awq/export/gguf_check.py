"""Whether llama.cpp computes what a model computes, tried before calibration with the model as it came.

llama.cpp has one fixed graph per architecture. What a config asks for beyond it (another rope scaling, caps left out,
routers that don't normalize) it ignores without a word, so the only proof is to run it and compare distributions.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.engines import answer, compare, find
from gptq_awq.models.offload import offloaded

log = logging.getLogger(__name__)
ENGINE = "xllamacpp"
LARGEST = 2_000_000_000
"""Parameters of the largest model that is tried: a float32 file of it takes 8 GB for a while."""
TOKENS = 40
LIMITS = {torch.float32: 1e-3}
LIMIT_16_BITS = 3e-2
"""Largest mean KL in nats where the model in memory computes in 16 bits itself."""


@torch.no_grad()
def check_llama_cpp(model: PreTrainedModel, path: Path, write: Callable[[], object]) -> None:
    """Compare llama.cpp's distributions with the model's, on one window of tokens.

    Args:
        model: full-precision model.
        path: where `write` writes a float32 file of it.
        write: writes the file.

    Raises:
        UserError: llama.cpp refuses the file, or computes something else.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    if find(ENGINE, "gguf") is None or offloaded(model) or size > LARGEST:
        why = "it is too large" if find(ENGINE, "gguf") else f"{ENGINE} is not installed"
        log.warning("export.formats: gguf was not tried in llama.cpp before calibration: %s", why)
        return
    write()
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(3, rows - 1), rows, (1, TOKENS), generator=draw)
    ours = model(input_ids=tokens.to(model.device)).logits.float().cpu()
    theirs = answer(ENGINE, path, tokens, "gguf", vocab=ours.shape[-1]).logits
    found = compare(ours, theirs, tokens)
    if found.mean_kl > LIMITS.get(model.dtype, LIMIT_16_BITS):
        raise UserError(
            f"export.formats=gguf: llama.cpp computes something else from this {type(model).__name__} (mean KL "
            f"{found.mean_kl:.2g}): its graph has no such option as the config asks for; choose another format"
        )
