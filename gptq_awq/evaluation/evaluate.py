"""Score a model before and after quantization on the same tokens and items, and compare the scores.

    baseline = full_precision(model, ...)   # before: computed once per model, then read from the cache
    ...                                     # the model is quantized in place
    scored = score(model, baseline, ...)    # after

`scored.metrics` is a flat map: `wikitext2/ppl@2048` is the quantized model's perplexity, `…/baseline` that of full
precision, `…/delta` quantized minus full precision and `…/delta_ci95` its interval [low, high]. `scored.scores` holds
the arrays that a later comparison with other runs needs. Metrics of texts are in `metrics`, one file each.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.baseline import AnswersFile, baseline_scores, floor_path
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.floor import Floor, floors
from gptq_awq.evaluation.head import Parameters
from gptq_awq.evaluation.metrics.base import LogitMetric, PairedTokens
from gptq_awq.evaluation.metrics.choice import metrics_of
from gptq_awq.evaluation.perplexity import TokenScores
from gptq_awq.evaluation.scores import Scores
from gptq_awq.evaluation.statistics import paired_test
from gptq_awq.evaluation.token_metrics import token_metrics, token_sums
from gptq_awq.models.offload import resident
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.runtime.progress import Track, no_track

if TYPE_CHECKING:  # lm-eval takes seconds to import, which runs without it need not spend
    from gptq_awq.evaluation.harness import TaskResults, Tasks, TaskScore

log = logging.getLogger(__name__)
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """Scores of the full-precision model, and the tokens and tasks that they are scores of.

    Attributes:
        tokens: windows of every text.
        scores: losses and hidden states, in the order of `tokens`.
        tasks: lm-eval tasks; None: none.
        results: scores on the tasks.
        output: copy of the output layer's parameters, if one was kept.
        compute_dtype: dtype of both models' forwards.
        floors: noise that a lower dtype than float32 adds, by the text's name.
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
        """Hashes, for the manifest, of each text's tokens ("wikitext2") and each task's requests ("lm_eval/TASK")."""
        tasks = self.results.sha256 if self.results else {}
        return {t.name: t.sha256 for t in self.tokens} | {f"lm_eval/{k}": v for k, v in tasks.items()}


@dataclass(frozen=True)
class Scored:
    """Scores of the quantized model: the metrics map, and the block sums and items that the metrics are made of."""

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

    `model_sha256` identifies the weights in the cache's keys; `cache_dir=None` caches nothing; `keep_output` copies
    the output layer of a model whose own will be rounded or transformed; `compute_dtype` is `Evaluation.compute_dtype`.
    Raises UserError if a window exceeds the model's context, its logits are not finite, or it has no separable head.
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

    kept = None if folder is None else AnswersFile.of(model, model_sha256, tokenizer, folder, dtype)
    answers = {} if kept is None else kept.read()
    known = len(answers)
    results = run_tasks(model, tokenizer, tasks, answers, track, dtype)
    if kept is not None and len(answers) > known:
        kept.add(answers)
    return Baseline(tuple(tokens), scores, tasks, results, output, dtype, noise)


def _precision(
    model: PreTrainedModel, model_sha256: str, tokens: Sequence[TokenSet], folder: Path | None, name: str
) -> tuple[torch.dtype, dict[str, Floor]]:
    """Compute dtype that `name` stands for with this model and these texts, and its noise floor by text.

    "auto" stands for a lower dtype than float32 only if its noise was measured on every text and is trusted.
    """
    dtype = resolve_compute_dtype(name, model.device)
    if dtype == torch.float32 or model.dtype != torch.float32:  # forwards of 16-bit weights are in their dtype
        return torch.float32, {}
    if name == "auto" and not tokens:
        log.info("eval.compute_dtype=auto: no text to measure the noise of %s on, so forwards use float32", dtype)
        return torch.float32, {}
    noise = floors(model, tokens, dtype, [floor_path(model, model_sha256, t, folder, dtype) for t in tokens])
    for text, found in noise.items():
        if name == "auto" and not found.trusted:
            log.info("eval.compute_dtype=auto: forwards use float32: %s is not trusted on %s (%s)", dtype, text, found)
            return torch.float32, {}
        log.info("evaluation forwards use %s, whose noise on %s is %s", dtype, text, found)
    return dtype, noise


def score(model: PreTrainedModel, tokenizer: Any, baseline: Baseline, seed: int = 0, track: Track = no_track) -> Scored:
    """Score the quantized model on the tokens and tasks of `baseline`; `seed` draws the bootstrap's resamples.

    Raises UserError if logits are not finite.
    """
    metrics: Metrics = {}
    arrays: dict[str, np.ndarray] = {}
    for tokens, scores in zip(baseline.tokens, baseline.scores, strict=True):
        measured = metrics_of(tokens)
        from_logits = [metric for metric in measured if isinstance(metric, LogitMetric)]
        found = divergence(model, tokens, scores, track, baseline.output, baseline.compute_dtype, from_logits)
        paired = PairedTokens(tokens, scores.nll, found.nll, found.kl, found.agree, found.from_logits)
        metrics |= token_metrics(paired, measured, seed)
        arrays |= token_sums(paired, measured)
        if noise := baseline.floors.get(tokens.name):
            of_metric = {f"{tokens.name}/kl": noise.kl, f"{tokens.name}/dnll": abs(noise.dnll)}
            metrics |= {f"{name}/floor": value for name, value in of_metric.items() if name in metrics}
    if baseline.tasks is not None and baseline.results is not None:
        from gptq_awq.evaluation.harness import run_tasks

        results = run_tasks(model, tokenizer, baseline.tasks, track=track, compute_dtype=baseline.compute_dtype)
        metrics |= task_metrics(baseline.results, results, seed)
        arrays |= task_items(baseline.results, results)
    return Scored(metrics, Scores(arrays))


def task_metrics(baseline: "TaskResults", quantized: "TaskResults", seed: int = 0) -> Metrics:
    """Every metric of every task, with a paired test over items if each item has a number.

    Raises ValueError if the two models answered different requests.
    """
    if baseline.sha256 != quantized.sha256:
        raise ValueError("lm-eval asked the two models different questions")
    metrics: Metrics = {}
    for key, full in baseline.scores.items():
        metrics |= _paired(f"lm_eval/{key}", full, quantized.scores[key], seed)
    return metrics


def task_items(baseline: "TaskResults", quantized: "TaskResults") -> dict[str, np.ndarray]:
    """Values of every item by metric, for scores.npz; metrics without a number per item are left out."""
    arrays: dict[str, np.ndarray] = {}
    for key, full in baseline.scores.items():
        items, value = full.items, quantized.scores[key].items
        if items is not None and value is not None:
            arrays |= {f"lm_eval/{key}": value.astype(np.float64), f"lm_eval/{key}/baseline": items.astype(np.float64)}
    return arrays


def _paired(name: str, full: "TaskScore", value: "TaskScore", seed: int) -> Metrics:
    """One task metric of both models, its change and the test of the change."""
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
