"""Score a model before and after quantization, on the same tokens and items, and say what it lost.

    baseline = full_precision(model, ...)   # before: computed once per model, then read from the cache
    ...                                     # the model is quantized in place
    scored = score(model, baseline, ...)    # after

`scored.metrics` is flat. Below a metric's name lies what belongs to it: `wikitext2/ppl@2048` (the quantized
model's), `…/baseline` (full precision), `…/delta` (quantized minus full precision), `…/delta_ci95` ([low,
high]). `scored.scores` is what a later comparison with other runs needs.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.baseline import baseline_scores, floor_path, read_answers, write_answers
from gptq_awq.evaluation.divergence import Divergence, divergence
from gptq_awq.evaluation.floor import Floor, floors
from gptq_awq.evaluation.head import Parameters
from gptq_awq.evaluation.perplexity import TokenScores, perplexity
from gptq_awq.evaluation.scores import Scores
from gptq_awq.evaluation.statistics import block_sums, interval, paired_test, resampled_means
from gptq_awq.models.offload import resident
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.runtime.progress import Track, no_track

if TYPE_CHECKING:  # lm-eval takes seconds to import, which runs without it need not spend
    from gptq_awq.evaluation.harness import TaskResults, Tasks, TaskScore

log = logging.getLogger(__name__)
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """What the full-precision model scored, and on what; `output` is a copy of its output layer, if one was kept.

    `compute_dtype`: of forwards, of both models; `floors`: the noise that a lower one than float32 adds, by text.
    """

    tokens: tuple[TokenSet, ...]
    scores: tuple[TokenScores, ...]
    tasks: "Tasks | None" = None
    results: "TaskResults | None" = None
    output: Parameters | None = None
    compute_dtype: torch.dtype = torch.float32
    floors: Mapping[str, Floor] = field(default_factory=dict)

    @property
    def sha256(self) -> dict[str, str]:
        """For the manifest: the hash of the tokens of each text ("wikitext2") and task ("lm_eval/TASK")."""
        tasks = self.results.sha256 if self.results else {}
        return {t.name: t.sha256 for t in self.tokens} | {f"lm_eval/{k}": v for k, v in tasks.items()}


@dataclass(frozen=True)
class Scored:
    """What the quantized model scored: the metrics map, and the sums and items that they are made of."""

    metrics: Metrics
    scores: Scores


def full_precision(
    model: PreTrainedModel,
    tokenizer: Any,
    model_sha256: str,
    tokens: Sequence[TokenSet],
    tasks: "Tasks | None" = None,
    cache_dir: Path | None = None,
    track: Track = no_track,
    keep_output: bool = False,
    compute_dtype: str = "float32",
) -> Baseline:
    """Score the full-precision model, or read its scores from `cache_dir`/baselines.

    `model_sha256` stands for the weights in the cache's keys; `cache_dir=None` caches nothing; `keep_output`
    copies the output layer, for a model whose own will be rounded too; `compute_dtype` is that of forwards
    (`Evaluation.compute_dtype`). Raises UserError where a window exceeds
    the model's context, its logits are not finite, or it has no separable head.
    """
    if len({t.name for t in tokens}) < len(tokens):
        raise ValueError("token sets share a name: their metrics would overwrite each other")
    folder = None if cache_dir is None else cache_dir / "baselines"
    dtype, noise = _precision(model, model_sha256, tokens, folder, compute_dtype)
    scores = tuple(baseline_scores(model, model_sha256, t, folder, track, dtype) for t in tokens)
    output = None
    if keep_output and tokens:
        layer = model.get_output_embeddings()
        if layer is not None:
            with resident(layer):
                output = {name: p.data.clone() for name, p in layer.named_parameters()}
    if tasks is None:
        return Baseline(tuple(tokens), scores, output=output, compute_dtype=dtype, floors=noise)
    from gptq_awq.evaluation.harness import run_tasks

    answers = {} if folder is None else read_answers(model, model_sha256, folder, dtype)
    known = len(answers)
    results = run_tasks(model, tokenizer, tasks, answers, track, dtype)
    if folder is not None and len(answers) > known:
        write_answers(model, model_sha256, folder, answers, dtype)
    return Baseline(tuple(tokens), scores, tasks, results, output, dtype, noise)


def _precision(
    model: PreTrainedModel, model_sha256: str, tokens: Sequence[TokenSet], folder: Path | None, name: str
) -> tuple[torch.dtype, dict[str, Floor]]:
    """The dtype of forwards that `name` means for this model on these texts, and its noise on each of them.

    "auto" means a lower one only where it was tried on every text and is trusted.
    """
    dtype = resolve_compute_dtype(name, model.device)
    if dtype == torch.float32 or model.dtype != torch.float32:  # 16-bit weights: forwards are in their dtype
        return torch.float32, {}
    if name == "auto" and not tokens:
        log.info("eval.compute_dtype=auto: no text to try %s on, so forwards compute in float32", dtype)
        return torch.float32, {}
    noise = floors(model, tokens, dtype, [floor_path(model, model_sha256, t, folder, dtype) for t in tokens])
    for text, found in noise.items():
        if name == "auto" and not found.trusted:
            log.info("eval.compute_dtype=auto: %s is not trusted on %s (%s): float32", dtype, text, found)
            return torch.float32, {}
        log.info("forwards compute in %s, whose noise on %s is %s", dtype, text, found)
    return dtype, noise


def score(model: PreTrainedModel, tokenizer: Any, baseline: Baseline, seed: int = 0, track: Track = no_track) -> Scored:
    """Score the quantized model on what `baseline` was scored on; `seed` draws the bootstrap's resamples.

    Raises UserError where logits are not finite.
    """
    metrics: Metrics = {}
    arrays: dict[str, np.ndarray] = {}
    for tokens, scores in zip(baseline.tokens, baseline.scores, strict=True):
        found = divergence(model, tokens, scores, track, baseline.output, baseline.compute_dtype)
        metrics |= token_metrics(tokens, scores, found, seed)
        arrays |= token_sums(tokens.name, scores, found)
        if tokens.name in baseline.floors:
            noise = baseline.floors[tokens.name]
            metrics |= {f"{tokens.name}/kl/floor": noise.kl, f"{tokens.name}/dnll/floor": abs(noise.dnll)}
    if baseline.tasks is not None and baseline.results is not None:
        from gptq_awq.evaluation.harness import run_tasks

        results = run_tasks(model, tokenizer, baseline.tasks, track=track, compute_dtype=baseline.compute_dtype)
        metrics |= task_metrics(baseline.results, results, seed)
        arrays |= task_items(baseline.results, results)
    return Scored(metrics, Scores(arrays))


def token_metrics(tokens: TokenSet, baseline: TokenScores, quantized: Divergence, seed: int = 0) -> Metrics:
    """Perplexity, loss difference, KL and agreement of one token set, with 95% block-bootstrap intervals.

    Intervals are left out, with a warning, where there are too few tokens for them.
    """
    name, ppl = tokens.name, f"{tokens.name}/ppl@{tokens.ids.shape[1]}"
    full, value = perplexity(baseline.nll), perplexity(quantized.nll)
    metrics: Metrics = {
        ppl: value,
        f"{ppl}/baseline": full,
        f"{ppl}/delta": value - full,
        f"{name}/dnll": float((quantized.nll - baseline.nll).double().mean()),
        f"{name}/kl": float(quantized.kl.double().mean()),
        f"{name}/top1_agreement": float(quantized.agree.double().mean()),
    }
    try:
        nll, q_nll, kl, agree = resampled_means(_series(baseline, quantized), seed=seed)
    except ValueError as error:
        log.warning("%s: no intervals (%s); more eval.perplexity.windows would give them", name, error)
        return metrics
    return metrics | {
        f"{ppl}/delta_ci95": list(interval(np.exp(q_nll) - np.exp(nll))),
        f"{name}/dnll/ci95": list(interval(q_nll - nll)),
        f"{name}/kl/ci95": list(interval(kl)),
        f"{name}/top1_agreement/ci95": list(interval(agree)),
    }


def token_sums(name: str, baseline: TokenScores, quantized: Divergence) -> dict[str, np.ndarray]:
    """Losses, KL and agreement of one text, summed over the bootstrap's blocks."""
    (nll, q_nll, kl, agree), lengths = block_sums(_series(baseline, quantized))
    sums = {"tokens": lengths.astype(np.float64), "nll": q_nll, "nll/baseline": nll, "kl": kl, "agree": agree}
    return {f"{name}/{key}": values for key, values in sums.items()}


def _series(baseline: TokenScores, quantized: Divergence) -> Float[np.ndarray, "4 windows scored"]:
    return np.stack([x.numpy() for x in (baseline.nll, quantized.nll, quantized.kl, quantized.agree.float())])


def task_metrics(baseline: "TaskResults", quantized: "TaskResults", seed: int = 0) -> Metrics:
    """Every metric of every task, with a paired test over its items where each item has a number.

    Raises ValueError where the two models were not asked the same.
    """
    if baseline.sha256 != quantized.sha256:
        raise ValueError("lm-eval asked the two models different questions")
    metrics: Metrics = {}
    for key, full in baseline.scores.items():
        metrics |= _paired(f"lm_eval/{key}", full, quantized.scores[key], seed)
    return metrics


def task_items(baseline: "TaskResults", quantized: "TaskResults") -> dict[str, np.ndarray]:
    """The values of every item, for every metric that has them."""
    arrays: dict[str, np.ndarray] = {}
    for key, full in baseline.scores.items():
        items, value = full.items, quantized.scores[key].items
        if items is not None and value is not None:
            arrays |= {f"lm_eval/{key}": value.astype(np.float64), f"lm_eval/{key}/baseline": items.astype(np.float64)}
    return arrays


def _paired(name: str, full: "TaskScore", value: "TaskScore", seed: int) -> Metrics:
    metrics: Metrics = {
        name: value.value,
        f"{name}/baseline": full.value,
        f"{name}/delta": value.value - full.value,
    }
    if value.stderr is not None:
        metrics[f"{name}/stderr"] = value.stderr
    if full.items is None or value.items is None:
        return metrics
    test = paired_test(full.items, value.items, seed)
    metrics |= {f"{name}/items": len(value.items), f"{name}/p_value": test.p_value, f"{name}/test": test.test}
    if value.stderr is not None:  # the metric is the items' mean, so the mean's interval is its own
        metrics[f"{name}/delta_ci95"] = list(test.ci95)
    return metrics
