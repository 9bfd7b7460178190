"""Protocol of metrics that compare the quantized with the full-precision model token by token.

A metric reads the per-token quantities of both models on one text (`PairedTokens`) and answers with numbers, which are
stored as TEXT/KEY and, below it, TEXT/KEY/SUFFIX. Three kinds cover most metrics:

- `MeanMetric`: the mean of one value per token, with a block-bootstrap interval (KL, top-1 agreement);
- `LogitMetric`: a `MeanMetric` whose values need the logits of both models;
- `TokenMetric` itself: any other function of the tokens, such as a percentile or a function of several means.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gptq_awq.data.tokens import TokenSet

Samples = Float[np.ndarray, "resamples"]


@dataclass(frozen=True)
class PairedTokens:
    """Per-token quantities of the full-precision and the quantized model on one text, on the CPU.

    Entry [w, t] belongs to the prediction of token t + 1 of window w, so scored = tokens per window - 1.

    Attributes:
        text: the windows that both models scored.
        baseline_nll: loss of the full-precision model, nats.
        nll: loss of the quantized model, nats.
        kl: KL(full precision ‖ quantized), nats.
        agree: whether both models have the same most likely word.
        from_logits: values of every `LogitMetric`, by its name.
    """

    text: TokenSet
    baseline_nll: Float[Tensor, "windows scored"]
    nll: Float[Tensor, "windows scored"]
    kl: Float[Tensor, "windows scored"]
    agree: Bool[Tensor, "windows scored"]
    from_logits: Mapping[str, Float[Tensor, "windows scored"]] = field(default_factory=dict)

    @property
    def series(self) -> dict[str, Float[Tensor, "windows scored"]]:
        """Per-token series that every run stores in scores.npz, by their names there."""
        return {"nll/baseline": self.baseline_nll, "nll": self.nll, "kl": self.kl, "agree": self.agree.float()}


@dataclass(frozen=True, kw_only=True)
class TokenMetric(ABC):
    """A number made of the per-token quantities of both models on one text.

    Attributes:
        name: name of the metric below the text's, without "/".
        higher_is_better: whether a larger value means a better model.
    """

    name: str
    higher_is_better: bool = False

    def key(self, text: TokenSet) -> str:  # noqa: ARG002
        """Name in results.json below the text's: `name`, and whatever the number depends on, such as "@SEQLEN"."""
        return self.name

    @abstractmethod
    def values(self, tokens: PairedTokens) -> dict[str, float]:
        """Numbers by suffix: "" the metric; where both models have one, "/baseline" and "/delta" (minus baseline)."""

    def series(self, tokens: PairedTokens) -> dict[str, Float[Tensor, "windows scored"]]:  # noqa: ARG002
        """Further per-token series by name, for `intervals`; they are stored in scores.npz too."""
        return {}

    def intervals(self, means: Mapping[str, Samples]) -> dict[str, Samples]:  # noqa: ARG002
        """Bootstrap samples of what gets a 95% interval, by suffix: "/ci95" of the metric, "/delta_ci95" of its delta.

        `means` holds, for every series, its mean in each resample of blocks of tokens. {}: no interval, as for numbers
        that are no function of means.
        """
        return {}

    def resampled(self, tokens: PairedTokens, seed: int) -> dict[str, Samples]:  # noqa: ARG002
        """Bootstrap samples of numbers that are no function of means, such as percentiles, by suffix as `intervals`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class MeanMetric(TokenMetric):
    """Mean of one value per token, with a 95% block-bootstrap interval; scores.npz holds its block sums."""

    @abstractmethod
    def per_token(self, tokens: PairedTokens) -> Tensor:
        """Value of every scored token, (windows, scored)."""

    def values(self, tokens: PairedTokens) -> dict[str, float]:
        """Mean of the values, in float64."""
        return {"": float(self.per_token(tokens).double().mean())}

    def series(self, tokens: PairedTokens) -> dict[str, Tensor]:
        """The values, under the metric's name."""
        return {self.name: self.per_token(tokens)}

    def intervals(self, means: Mapping[str, Samples]) -> dict[str, Samples]:
        """Interval of the mean."""
        return {"/ci95": means[self.name]}


@dataclass(frozen=True, kw_only=True)
class LogitMetric(MeanMetric):
    """Mean of one value per token that is computed from both models' logits.

    Costs two more rows of head matmul per token, for all logit metrics together.
    """

    @abstractmethod
    def of_logits(
        self,
        full: Float[Tensor, "tokens vocab"],
        quantized: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, "tokens"],
    ) -> Float[Tensor, "tokens"]:
        """Value of each token, from the logits of both models and the true next words."""

    def per_token(self, tokens: PairedTokens) -> Tensor:
        """The values that `of_logits` gave while the text was scored."""
        return tokens.from_logits[self.name]
