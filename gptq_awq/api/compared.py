"""A quantized model beside full precision, both in memory: scores on the same tokens, and what both write."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.samples.continuation import continue_greedily
from gptq_awq.evaluation.samples.difference import Sample, compared
from gptq_awq.evaluation.samples.prompts import Prompt
from gptq_awq.report.rows import measured
from gptq_awq.report.samples import RunSamples, markdown
from gptq_awq.report.text import difference, number


@dataclass(frozen=True)
class ModelComparison:
    """Scores and texts of a quantized model and of full precision; `str` and notebooks show tables.

    Attributes:
        metrics: as in results.json: `text/ppl@512`, with /baseline, /delta and /delta_ci95, `text/kl`, ….
        samples: what both write after each prompt.
    """

    metrics: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)

    def __str__(self) -> str:
        return self._repr_markdown_()

    def _repr_markdown_(self) -> str:
        parts = []
        if self.metrics:
            lines = ["| metric | full precision | quantized | difference |", "| :--- | ---: | ---: | ---: |"]
            for name in measured(self.metrics):
                value, baseline = number(self.metrics[name]), number(self.metrics.get(f"{name}/baseline"))
                lines.append(f"| {name} | {baseline} | {value} | {difference(self.metrics, name)} |")
            parts.append("\n".join(lines))
        if self.samples:
            parts.append(markdown([RunSamples("", "quantized", self.samples)]))
        return "\n\n".join(parts)


def compare_models(
    full: PreTrainedModel,
    quantized: Any,
    windows: TokenSet | None,
    prompts: Sequence[str],
    tokenizer: Any,
    tokens: int,
) -> ModelComparison:
    """Score both models on the windows, and let both go on from the prompts.

    Raises:
        UserError: there is nothing to compare on; prompts without a tokenizer; logits that aren't finite.
    """
    if windows is None and not prompts:
        raise UserError("texts: nothing to compare on; give texts or token ids, or prompts")
    if prompts and tokenizer is None:
        raise UserError("prompts: need a tokenizer: pass tokenizer=…")
    metrics, samples = {}, []
    if windows is not None:
        baseline = full_precision(full, tokenizer, "memory", (windows,), keep_output=True)
        metrics = score(quantized, tokenizer, baseline).metrics
    if prompts:
        asked = [Prompt(text) for text in prompts]
        samples = compared(*(continue_greedily(each, tokenizer, asked, tokens) for each in (full, quantized)))
    return ModelComparison(metrics, samples)
