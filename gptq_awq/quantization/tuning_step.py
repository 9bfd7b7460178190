"""Tuning in the block loop: examples for a block's, and what the whole model's changes in finished blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gptq_awq.calibration.activations import Activations
from gptq_awq.data.tokens import TokenSet
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.resume import BlockResult, Row
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track
from gptq_awq.tuning.base import Example
from gptq_awq.tuning.teacher import Teacher


def examples(activations: Activations, index: int, entered: Sequence[Tensor]) -> list[Example]:
    """What a block that the activations have just passed learns from; `entered` it before."""
    pairs = zip(activations.batches, entered, strict=True)
    found = []
    for batch, inputs in pairs:
        assert batch.full is not None
        found.append(Example(inputs, batch.full, batch.calls[index], batch.mask))
    return found


def tuned_model(
    model: nn.Module,
    method: Method,
    results: list[BlockResult],
    teacher: Teacher,
    tokens: TokenSet,
    track: Track,
) -> Iterator[BlockResult]:
    """Tune a model, in place, whose blocks are all solved; the results, with weights and rows as they are then."""
    weights = {name: weight for block in results if block.index >= 0 for name, weight in block.weights.items()}
    for tuning in method.model_tunings:
        with phase("tune"):
            weights, details = tuning.apply(model, weights, teacher, tokens, track)
        results = [replace(block, rows=noted(block.rows, weights, tuning.name, details)) for block in results]
    for block in results:
        yield replace(block, weights={name: weights.get(name, weight) for name, weight in block.weights.items()})


def noted(
    rows: list[Row], weights: Mapping[str, QuantizedWeight], tuning: str, details: Mapping[str, Any]
) -> list[Row]:
    """Ledger rows that say so. Errors in them are the solver's, before any tuning."""
    return [
        row | {"tuning": row.get("tuning", {}) | {tuning: details}, "codes_sha256": weights[row["name"]].sha256()}
        if row["name"] in weights
        else row
        for row in rows
    ]


def entering(activations: Activations | None, wanted: bool) -> list[Tensor]:
    """What enters the next block, kept for tuning it; blocks don't write into it."""
    return [batch.hidden for batch in activations.batches] if wanted and activations is not None else []
