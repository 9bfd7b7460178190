"""Losses, KL and top-1 agreement from logits that are computed one tile at a time, on the CPU.

A tile holds the logits of some tokens and some words of the vocabulary: small enough to stay in cache between the
product that computes it and the one pass that reads it (kernels/softmax.py), large enough for the product to run at
full speed. Over tiles, each token carries a running log-sum-exp and the position of its largest logit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gptq_awq.evaluation.head import Head, Parameters
from gptq_awq.kernels.softmax import add_tile, add_tiles
from gptq_awq.runtime.profiling import phase


@dataclass(frozen=True)
class Running:
    """Running log-sum-exp and argmax of some tokens' logits, over the tiles seen so far.

    Attributes:
        shift: number subtracted from logits before they are exponentiated; log-sum-exp = shift + log(total).
        total: sum of exponentials, float64.
        best: first word with the largest logit.
        targets: the tokens' next words.
        target: logit of each target, once its tile was seen.
    """

    shift: Float[Tensor, "tokens"]
    total: Float[Tensor, "tokens"]
    best: Int[Tensor, "tokens"]
    targets: Int[Tensor, "tokens"]
    target: Float[Tensor, "tokens"]

    @classmethod
    def over(cls, targets: Int[Tensor, "tokens"]) -> "Running":
        """Start state, before the first tile."""
        n = len(targets)
        nothing = torch.zeros(n, dtype=torch.float64)
        return cls(torch.zeros(n), nothing, torch.zeros(n, dtype=torch.long), targets, torch.zeros(n))

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments shift, total and best of the kernels, as NumPy views of the tensors."""
        return self.shift.numpy(), self.total.numpy(), self.best.numpy()

    def see_targets(self, logits: Float[Tensor, "tokens words"], first: int) -> None:
        """Store the logits of targets that lie in this tile, which begins with the word `first`."""
        here = ((self.targets >= first) & (self.targets < first + logits.shape[1])).nonzero()[:, 0]
        self.target[here] = logits[here, self.targets[here] - first]

    def nll(self) -> Float[Tensor, "tokens"]:
        """Loss -log p(target) in nats, float32."""
        return (self.total.log() + (self.shift.double() - self.target.double())).float()


def predictions(
    head: Head, states: Float[Tensor, "tokens width"], targets: Int[Tensor, "tokens"]
) -> tuple[Float[Tensor, "tokens"], Int[Tensor, "tokens"]]:
    """Loss -log p(target) and most likely word (the first on a tie) of each state; NaN where a logit is not finite."""
    nll, best = torch.empty(len(states)), torch.empty(len(states), dtype=torch.long)
    for rows, tiles in head.tiles(len(states)):
        seen, own = Running.over(targets[rows]), head.laying_out_once()
        for words in tiles:
            logits = own(states[rows], words).contiguous()
            with phase("score/losses"):
                add_tile(*_both(logits), words.start, *seen.sums)
                seen.see_targets(logits, words.start)
        nll[rows], best[rows] = seen.nll(), seen.best
    return nll, best


def comparison(
    head: Head,
    full: Float[Tensor, "tokens width"],
    states: Float[Tensor, "tokens width"],
    targets: Int[Tensor, "tokens"],
    output: Parameters | None = None,
    full_head: Head | None = None,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """Loss -log q(target), KL(p ‖ q) and top-1 agreement of each token; not finite where a logit is not.

    q comes from `states` through `head`; p from the full-precision states `full` through `full_head` (None: `head`)
    with the parameters `output` in its output layer (None: its own).
    """
    nll, kl, agree = torch.empty(len(states)), torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
    for rows, tiles in head.tiles(len(states)):
        p_seen, q_seen = Running.over(targets[rows]), Running.over(targets[rows])
        cross = torch.zeros_like(q_seen.total)
        own = head.laying_out_once()
        other = own if full_head is None else full_head.laying_out_once()
        for words in tiles:
            p = other(full[rows], words, output).contiguous()
            q = own(states[rows], words).contiguous()
            with phase("score/losses"):
                add_tiles(*_both(p), *p_seen.sums, *_both(q), *q_seen.sums, words.start, cross.numpy())
                q_seen.see_targets(q, words.start)
        nll[rows] = q_seen.nll()
        kl[rows] = (cross / p_seen.total - p_seen.total.log() + q_seen.total.log()).float()
        agree[rows] = p_seen.best == q_seen.best
    return nll, kl, agree


def _both(logits: Float[Tensor, "tokens words"]) -> tuple[np.ndarray, np.ndarray]:
    """Logits as the kernels take them: values, and their bits as int32 in the same memory."""
    values = logits.numpy()
    return values, values.view(np.int32)
