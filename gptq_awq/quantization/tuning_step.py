"""Tuning in the block loop: examples for a block's, and what the whole model's changes in finished blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gptq_awq.calibration.activations import Streams
from gptq_awq.data.tokens import TokenSet
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.resume import BlockResult, Row
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track
from gptq_awq.tuning.base import Example
from gptq_awq.tuning.teacher import Teacher


def examples(streams: Streams, index: int, entered: Sequence[Tensor]) -> list[Example]:
    """What a block that the streams have just passed learns from; `entered` it before."""
    pairs = zip(streams.batches, entered, strict=True)
    found = []
    for stream, inputs in pairs:
        assert stream.full is not None
        found.append(Example(inputs, stream.full, stream.calls[index], stream.mask))
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
    for tuning in method.tuning_of_model:
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


def entering(streams: Streams | None, wanted: bool) -> list[Tensor]:
    """What enters the next block, kept for tuning it; blocks don't write into it."""
    return [stream.hidden for stream in streams.batches] if wanted and streams is not None else []
