"""Tuning in the block loop: training examples of one block, and results after tuning of the whole model."""

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


def hidden_states(activations: Activations) -> list[Tensor]:
    """The hidden states of every batch that enter the next block, which replaces them without writing to them."""
    return [batch.hidden for batch in activations.batches]


def examples(activations: Activations, index: int, block_inputs: Sequence[Tensor]) -> list[Example]:
    """Training examples of block `index`: its inputs in the quantized model, and its full-precision outputs.

    Args:
        activations: activations that have passed the block, with full-precision hidden states.
        index: the block's number.
        block_inputs: `hidden_states` from before the block.
    """
    found = []
    for batch, inputs in zip(activations.batches, block_inputs, strict=True):
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
    """Tune a model whose blocks are all solved, in place; yields the blocks' results with the tuned weights."""
    weights = {name: weight for block in results if block.index >= 0 for name, weight in block.weights.items()}
    for tuning in method.model_tunings:
        with phase("tune"):
            weights, details = tuning.apply(model, weights, teacher, tokens, track)
        results = [replace(block, rows=with_tuning(block.rows, weights, tuning.name, details)) for block in results]
    for block in results:
        yield replace(block, weights={name: weights.get(name, weight) for name, weight in block.weights.items()})


def with_tuning(
    rows: list[Row], weights: Mapping[str, QuantizedWeight], tuning: str, details: Mapping[str, Any]
) -> list[Row]:
    """Ledger rows with a tuning's details and the tuned codes' hash; their errors stay those before any tuning."""
    return [
        row | {"tuning": row.get("tuning", {}) | {tuning: details}, "codes_sha256": weights[row["name"]].sha256()}
        if row["name"] in weights
        else row
        for row in rows
    ]
