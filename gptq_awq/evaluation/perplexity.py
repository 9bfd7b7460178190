"""Perplexity by the GPTQ protocol (arXiv:2210.17323): contiguous windows, each scored independently.

A window of T tokens (no BOS added) yields T-1 next-token losses, and ppl = exp(mean loss over all windows). The
original code multiplies each window's mean loss by T and divides the sum by the number of windows times T, which gives
an equal number.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.states import states_of
from gptq_awq.evaluation.tiles import predictions
from gptq_awq.models.context_length import context_length
from gptq_awq.models.offload import resident
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track, no_track


@dataclass(frozen=True)
class TokenScores:
    """Losses and last hidden states of one model at every scored token, on the CPU.

    Attributes:
        nll: -log p(next token) in nats, fp32.
        hidden: input of the output head at the same positions, in the model's dtype; with the head it gives the
            model's whole next-token distribution.
        head_sha256: content hash of the head's output layer.
    """

    nll: Float[Tensor, "windows scored"]
    hidden: Float[Tensor, "windows scored width"]
    head_sha256: str


def perplexity(nll: Float[Tensor, "windows scored"]) -> float:
    """Perplexity: exp of the mean loss, in float64."""
    return float(nll.double().mean().exp())


def token_losses(
    model: PreTrainedModel, tokens: TokenSet, track: Track = no_track, compute_dtype: torch.dtype = torch.float32
) -> TokenScores:
    """Next-token losses of `model` on every window, one forward per window, in `compute_dtype` (see `precision`).

    Raises UserError where a window is longer than the model's context, or a logit is not finite.
    """
    head = Head.of(model, compute_dtype)
    windows = checked_windows(model, tokens)
    nll = torch.empty(len(windows), windows.shape[1] - 1)
    hidden = None
    seen = states_of(head, windows, f"{tokens.name}: full precision", track)
    with resident(head.output):
        for index, states in enumerate(track(seen, f"{tokens.name}: full precision", len(windows))):
            if hidden is None:
                hidden = torch.empty(len(windows), *states.shape, dtype=states.dtype)
            hidden[index] = states
            nll[index] = next_token_nll(head, states, windows[index, 1:])
            check_finite(nll[index], tokens.name, index)
        assert hidden is not None
        return TokenScores(nll, hidden, head.sha256())


def next_token_nll(
    head: Head, states: Float[Tensor, "scored width"], targets: Int[Tensor, "scored"]
) -> Float[Tensor, "scored"]:
    """-log p(target) in nats of each hidden state's target, returned on the CPU."""
    if states.device.type == "cpu":
        return predictions(head, states, targets)[0]
    nll = torch.empty(len(states))
    for part in head.chunks(len(states)):
        logits = head(states[part])
        with phase("score/losses"):
            nll[part] = token_nll(logits.log_softmax(-1), targets[part]).cpu()
    return nll


def checked_windows(model: PreTrainedModel, tokens: TokenSet) -> Int[Tensor, "windows tokens"]:
    """Token ids of the windows, as int64. Raises UserError if they exceed the model's context."""
    if tokens.mask is not None:
        raise ValueError(f"{tokens.name}: perplexity is scored on windows without padding")
    count, length = tokens.ids.shape
    if count == 0 or length < 2:
        raise UserError(f"eval.perplexity.seqlen={length}: there is nothing to score in {count} windows")
    limit = context_length(model)
    if limit is not None and length > limit:
        raise UserError(f"eval.perplexity.seqlen={length} is longer than the model's context of {limit} tokens")
    return tokens.ids.long()


def token_nll(log_p: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """-log p(target) of each token in nats, from log probabilities."""
    return -log_p.gather(-1, targets[:, None].to(log_p.device))[:, 0]


def check_finite(values: Float[Tensor, "scored"], name: str, window: int) -> None:
    """Raise UserError, naming the text, window and first token, if a score is not finite."""
    if not values.isfinite().all():
        token = int((~values.isfinite()).nonzero()[0])
        raise UserError(
            f"the model's logits are not finite (eval text {name}, window {window}, token {token}): "
            "try dtype=float32, or more bits"
        )
