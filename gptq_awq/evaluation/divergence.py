"""KL divergence and top-1 agreement of the quantized with the full-precision model, token by token.

KL(p ‖ q) = Σ p (log p - log q) in nats, with p the next-token distribution of the full-precision and q of the quantized
model; top-1 agreement is argmax p = argmax q. Unlike perplexity, neither can improve by luck: a model whose changes of
probability cancel keeps its perplexity but not its KL ("Accuracy is Not All You Need", arXiv:2407.09141).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.head import Head, Parameters
from gptq_awq.evaluation.metrics.base import LogitMetric
from gptq_awq.evaluation.perplexity import (
    TokenScores,
    check_finite,
    checked_windows,
    token_nll,
)
from gptq_awq.evaluation.states import states_of
from gptq_awq.evaluation.tiles import comparison
from gptq_awq.models.offload import resident
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track, no_track


@dataclass(frozen=True)
class Divergence:
    """Comparison of the quantized with the full-precision model per scored token, on the CPU.

    Attributes:
        nll: loss of the quantized model, nats.
        kl: KL(full precision ‖ quantized), nats.
        agree: whether both models have the same most likely word.
        from_logits: values of every `LogitMetric` that was asked for, by its name.
    """

    nll: Float[Tensor, "windows scored"]
    kl: Float[Tensor, "windows scored"]
    agree: Bool[Tensor, "windows scored"]
    from_logits: Mapping[str, Float[Tensor, "windows scored"]] = field(default_factory=dict)


def divergence(
    model: PreTrainedModel,
    tokens: TokenSet,
    baseline: TokenScores,
    track: Track = no_track,
    output: Parameters | None = None,
    compute_dtype: torch.dtype = torch.float32,
    logit_metrics: Sequence[LogitMetric] = (),
) -> Divergence:
    """Score every window with the quantized `model` and compare it with `baseline`, its full-precision scores.

    Both must use one `compute_dtype`. `output` holds the parameters of the full-precision output layer if the model's
    own were changed. Each token costs one forward of the quantized model and two rows of head matmul, and two more rows
    if there are `logit_metrics`. Raises UserError if a logit is not finite, ValueError if the full-precision output
    layer is not the baseline's.
    """
    head = Head.of(model, compute_dtype)
    with resident(head.output), head.with_output(output):
        if head.sha256() != baseline.head_sha256:
            raise ValueError("the output layer is not the full-precision one: KL would compare two heads")
    windows = checked_windows(model, tokens)
    nll, kl = torch.empty_like(baseline.nll), torch.empty_like(baseline.nll)
    agree = torch.empty_like(baseline.nll, dtype=torch.bool)
    from_logits = {metric.name: torch.empty_like(nll) for metric in logit_metrics}
    seen = states_of(head, windows, f"{tokens.name}: quantized", track)
    with resident(head.output):
        for index, states in enumerate(track(seen, f"{tokens.name}: quantized", len(windows))):
            compared = compare(head, baseline.hidden[index], states, windows[index, 1:], output)
            nll[index], kl[index], agree[index] = compared
            check_finite(nll[index] + kl[index], tokens.name, index)
            if logit_metrics:
                values = _from_logits(head, baseline.hidden[index], states, windows[index, 1:], output, logit_metrics)
                for name, row in values.items():
                    from_logits[name][index] = row
    return Divergence(nll, kl, agree, from_logits)


def compare(
    head: Head,
    full: Float[Tensor, "scored width"],
    states: Float[Tensor, "scored width"],
    targets: Int[Tensor, "scored"],
    output: Parameters | None = None,
    full_head: Head | None = None,
) -> tuple[Float[Tensor, "scored"], Float[Tensor, "scored"], Bool[Tensor, "scored"]]:
    """Loss -log q(target), KL(p ‖ q) and top-1 agreement of each token, returned on the CPU.

    q comes from `states` through `head`; p from the full-precision states `full` through `full_head` (None: `head`)
    with the parameters `output` in its output layer (None: its own).
    """
    if states.device.type == "cpu":
        return comparison(head, full, states, targets, output, full_head)
    nll, kl, agree = torch.empty(len(states)), torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
    for part in head.chunks(len(states)):
        p, q = (full_head or head)(full[part], output=output), head(states[part])
        with phase("score/losses"):
            agree[part] = (p.argmax(-1) == q.argmax(-1)).cpu()
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            nll[part] = token_nll(log_q, targets[part]).cpu()
            kl[part] = token_kl(log_p, log_q).cpu()
    return nll, kl, agree


def _from_logits(
    head: Head,
    full: Float[Tensor, "scored width"],
    states: Float[Tensor, "scored width"],
    targets: Int[Tensor, "scored"],
    output: Parameters | None,
    metrics: Sequence[LogitMetric],
) -> dict[str, Float[Tensor, "scored"]]:
    """Value of each token by metric name, from whole rows of both models' logits, returned on the CPU."""
    found = {metric.name: torch.empty(len(states)) for metric in metrics}
    for part in head.chunks(len(states)):
        p, q = head(full[part], output=output), head(states[part])
        with phase("score/losses"):
            for metric in metrics:
                values = metric.of_logits(p, q, targets[part].to(q.device))
                if values.shape != q.shape[:1]:
                    raise TypeError(f"{metric.name}: {tuple(values.shape)} values for {len(q)} tokens")
                found[metric.name][part] = values.float().cpu()
    return found


def token_kl(log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens"]:
    """KL(p ‖ q) of each token in nats, from log probabilities."""
    return (log_p - log_q).mul_(log_p.exp()).sum(-1)
