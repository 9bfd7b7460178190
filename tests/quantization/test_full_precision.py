"""Full precision is full precision: its moments and activations are those of the model before anything is rounded."""

import copy
from contextlib import suppress

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.quantization.block import BlockStep
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptaq import GPTAQ
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal
from gptq_awq.transforms.awq import AWQ
from gptq_awq.tuning.rounding import LearnedRounding

ROUNDS_EMBEDDING = [LlamaMix("q4_0"), LlamaMix("q2_k")]
PLAIN = IntGrid(3, 32)
ON_FULL_PRECISION = {
    "awq": Method("awq", RTN(), {"awq": AWQ()}, error_propagation=False),
    "gptq": Method("gptq", GPTQ(), error_propagation=False),
}


class Everywhere(IntGrid):
    """One integer grid for the embedding, too, as only a mix of the user's own has it."""

    def at(self, place):
        return IntGrid(self.bits, self.group_size, scale_dtype=self.scale_dtype)


COMPARES = [
    (Method("gptaq", GPTAQ()), LlamaMix("q4_0")),
    (Method("qronos", Qronos()), LlamaMix("q2_k")),
    (
        Method("learned rounding", RTN(), tuning={"rounding": LearnedRounding()}),
        Everywhere(3, 32, scale_dtype="float16"),
    ),
]


class Stopped(Exception):  # noqa: N818
    """Ends a run once its first block's input was seen."""


def wide_model():
    """A random model with an embedding that a coarse grid rounds badly; its blocks are 256 wide, as k-quants want."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def quantized(method, grid, record=None, model=None):
    """The model, and the ledger's hashes of codes within the blocks."""
    model = model or wide_model()
    rows = [row for block in quantize(model, tokens(), method, grid, SMALL, record=record) for row in block.rows]
    return model, [row["codes_sha256"] for row in rows if row["block"] >= 0]


@pytest.mark.parametrize("method", ON_FULL_PRECISION)
@pytest.mark.parametrize("grid", ROUNDS_EMBEDDING, ids=str)
def test_a_record_made_under_one_grid_equals_one_made_under_another(tmp_path, grid, method):
    records = [ObservationCache(Journal(tmp_path / name, "key"), 10**9) for name in ("mixed", "plain")]
    for record, first in zip(records, (grid, PLAIN), strict=True):
        quantized(ON_FULL_PRECISION[method], first, record)
    for index in range(2):
        mixed, plain = (record.journal.block(index) for record in records)
        assert mixed.facts == plain.facts
        assert all(torch.equal(x, mixed.tensors[name]) for name, x in plain.tensors.items())
    codes = [quantized(ON_FULL_PRECISION[method], each, records[0])[1] for each in (PLAIN, grid)]
    assert codes == [quantized(ON_FULL_PRECISION[method], each)[1] for each in (PLAIN, grid)]


@pytest.mark.parametrize(("method", "grid"), COMPARES, ids=lambda each: getattr(each, "name", ""))
def test_activations_of_full_precision_start_from_the_embedding_that_is_not_rounded(monkeypatch, method, grid):
    model, entering = wide_model(), []

    def watched(_step, inputs):
        entering.extend((batch.full, batch.hidden) for batch in inputs.activations.batches)
        raise Stopped

    monkeypatch.setattr(BlockStep, "run", watched)
    before = copy.deepcopy(model.model.embed_tokens)
    with suppress(Stopped):
        quantized(method, grid, model=model)
    after, batches = model.model.embed_tokens, tokens().ids.split(2)
    assert len(entering) == len(batches) == 3
    for (full, hidden), ids in zip(entering, batches, strict=True):
        assert torch.equal(full, before(ids))
        assert torch.equal(hidden, after(ids))
        assert not torch.equal(full, hidden)


@pytest.mark.parametrize("grid", ROUNDS_EMBEDDING, ids=str)
def test_inputs_of_the_quantized_model_are_those_of_its_rounded_embedding(grid):
    """Block by block, the moments that GPTQ is given are those of the model quantized so far."""
    seen = []

    class Watching(GPTQ):
        def solve(self, weight, moments, grid):
            seen.append(moments.hessian)
            return super().solve(weight, moments, grid)

    model, _ = quantized(Method("gptq", Watching()), grid)
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(tokens().ids)).reshape(-1, 256)
    assert torch.allclose(seen[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_tiny_model_with_an_ordinary_grid_is_embedded_once(monkeypatch):
    from gptq_awq.calibration import block_inputs

    monkeypatch.setattr(block_inputs, "embed_again", None)
    quantized(Method("gptq", GPTQ()), PLAIN, model=tiny_model("llama"))
