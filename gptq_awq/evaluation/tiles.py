"""Losses, KL and agreement from logits that exist only a tile at a time (CPU).

A tile is some tokens by some words of the vocabulary: small enough to stay in cache between the product that makes it
and the one pass that reads it (kernels/softmax.py), large enough for the product to run at full speed. What a token
needs of all its logits is a running log-sum-exp, and where the largest was.
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
    """Of some tokens' logits seen so far: log-sum-exp = shift + log(total), the first of the largest, the target's."""

    shift: Float[Tensor, "tokens"]
    total: Float[Tensor, "tokens"]
    best: Int[Tensor, "tokens"]
    targets: Int[Tensor, "tokens"]
    target: Float[Tensor, "tokens"]

    @classmethod
    def over(cls, targets: Int[Tensor, "tokens"]) -> "Running":
        """Before the first tile."""
        n = len(targets)
        nothing = torch.zeros(n, dtype=torch.float64)
        return cls(torch.zeros(n), nothing, torch.zeros(n, dtype=torch.long), targets, torch.zeros(n))

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As the kernels take them; the same memory."""
        return self.shift.numpy(), self.total.numpy(), self.best.numpy()

    def see_targets(self, logits: Float[Tensor, "tokens words"], first: int) -> None:
        """Keep the logits of targets that are in this tile, which begins with the word `first`."""
        here = ((self.targets >= first) & (self.targets < first + logits.shape[1])).nonzero()[:, 0]
        self.target[here] = logits[here, self.targets[here] - first]

    def nll(self) -> Float[Tensor, "tokens"]:
        """-log p(target), float32."""
        return (self.total.log() + (self.shift.double() - self.target.double())).float()


def predictions(
    head: Head, states: Float[Tensor, "tokens width"], targets: Int[Tensor, "tokens"]
) -> tuple[Float[Tensor, "tokens"], Int[Tensor, "tokens"]]:
    """-log p(target) of each state, and its most likely word (the first on a tie); NaN where a logit is not finite."""
    nll, best = torch.empty(len(states)), torch.empty(len(states), dtype=torch.long)
    for rows, tiles in head.tiles(len(states)):
        seen = Running.over(targets[rows])
        for words in tiles:
            logits = head(states[rows], words).contiguous()
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
    """-log q(target), KL(p ‖ q) and whether both have the same most likely word; not finite where a logit is not.

    p is of the states `full`, through the output layer `output` (None: the model's own) of `full_head` (None: `head`);
    q of `states`, through `head`.
    """
    nll, kl, agree = torch.empty(len(states)), torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
    for rows, tiles in head.tiles(len(states)):
        p_seen, q_seen = Running.over(targets[rows]), Running.over(targets[rows])
        cross = torch.zeros_like(q_seen.total)
        for words in tiles:
            p = (full_head or head)(full[rows], words, output).contiguous()
            q = head(states[rows], words).contiguous()
            with phase("score/losses"):
                add_tiles(*_both(p), *p_seen.sums, *_both(q), *q_seen.sums, words.start, cross.numpy())
                q_seen.see_targets(q, words.start)
        nll[rows] = q_seen.nll()
        kl[rows] = (cross / p_seen.total - p_seen.total.log() + q_seen.total.log()).float()
        agree[rows] = p_seen.best == q_seen.best
    return nll, kl, agree


def _both(logits: Float[Tensor, "tokens words"]) -> tuple[np.ndarray, np.ndarray]:
    values = logits.numpy()
    return values, values.view(np.int32)
