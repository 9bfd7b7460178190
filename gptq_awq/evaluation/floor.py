"""Noise floor of low-precision evaluation forwards: KL of the full-precision model from itself, measured before use.

The full-precision model is scored on the first tokens of a text with float32 forwards and with low-precision ones. The
KL between the two is the floor: a quantized model's KL cannot be known more precisely than that. On SmolLM2-135M it is
2e-4 in bfloat16, on stories15M 9e-5: less than a thousandth of the KL of 4-bit RTN (0.36, 0.11), but a fifth
and a quarter of that of 8-bit RTN (1.1e-3, 3.3e-4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.divergence import compare
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import checked_windows, next_token_nll
from gptq_awq.evaluation.states import states_of
from gptq_awq.models.offload import resident
from gptq_awq.storage.checksummed import ChecksummedFile, once

TRIAL_TOKENS = 2048
"""Number of tokens, rounded up to whole windows, that a noise floor is measured on."""
MAX_LOSS_CHANGE = 1e-3
"""Largest trusted change of the mean loss, in nats; 1e-3 nats are 0.1% of the perplexity."""
MAX_KL = 5e-4
"""Largest trusted KL: twice that of bfloat16 on models it suits, 0.5% of the KL of a good 4-bit model (0.1)."""


@dataclass(frozen=True)
class Floor:
    """Noise that low-precision forwards add to the scores of one and the same model.

    Attributes:
        kl: mean over tokens of KL(float32 forwards ‖ low-precision forwards), in nats.
        dnll: mean loss with low-precision forwards minus that with float32 forwards, in nats.
    """

    kl: float
    dnll: float

    @property
    def trusted(self) -> bool:
        """Whether eval.compute_dtype=auto uses the lower precision; a floor that is not finite is never trusted."""
        return self.kl <= MAX_KL and abs(self.dnll) <= MAX_LOSS_CHANGE

    def __str__(self) -> str:
        return f"KL {self.kl:.1e}, perplexity {math.expm1(min(self.dnll, 700)):+.2%}"


def floor(model: PreTrainedModel, tokens: TokenSet, dtype: torch.dtype) -> Floor:
    """Measure the noise floor of compute dtype `dtype` on a text's first `TRIAL_TOKENS` tokens. Raises UserError."""
    count = math.ceil(TRIAL_TOKENS / tokens.ids.shape[1])
    windows = checked_windows(model, replace(tokens, ids=tokens.ids[:count]))
    plain, lower = Head.of(model), Head.of(model, dtype)
    kl, change = [], []
    seen = [states_of(head, windows, f"{tokens.name}: {head.compute_dtype}") for head in (plain, lower)]
    with resident(plain.output):
        for window, full, states in zip(windows, *seen, strict=True):
            nll, divergence, _ = compare(lower, full, states, window[1:], full_head=plain)
            kl.append(divergence.double())
            change.append(nll.double() - next_token_nll(plain, full, window[1:]).double())
    return Floor(float(torch.cat(kl).mean()), float(torch.cat(change).mean()))


def floors(
    model: PreTrainedModel, tokens: Sequence[TokenSet], dtype: torch.dtype, paths: Sequence[Path | None]
) -> dict[str, Floor]:
    """Noise floor by text name: read from the text's path if the file exists, else measured and stored there."""
    found = {}
    for text, path in zip(tokens, paths, strict=True):

        def compute(text: TokenSet = text) -> ChecksummedFile:
            measured = floor(model, text, dtype)
            return ChecksummedFile({"floor": torch.tensor([measured.kl, measured.dnll], dtype=torch.float64)})

        kept = compute() if path is None else once(path, f"noise floor of {text.name}", compute)
        found[text.name] = Floor(*kept.tensors["floor"].tolist())
    return found
