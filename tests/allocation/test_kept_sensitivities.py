"""Sensitivities of offloaded models, and what of them is kept: those of a model in memory, and only finite ones."""

import json

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens
from transformers import AutoConfig

from gptq_awq.allocation.allocate import allocate
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.models import offloaded_model
from gptq_awq.models.offloaded_model import open_offloaded
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.checksummed import ChecksummedFile

SMALL = Settings(compute_dtype="float32", tokens_per_batch=64)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A function that opens the tiny model with its blocks on disk."""
    monkeypatch.setattr(offloaded_model, "SMALL", 100)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    return lambda: open_offloaded(tmp_path / "model", config, torch.float32, torch.device("cpu"), "model.path=x")


def allocation(model, sensitivity="error", solver=RTN(), cache=None):  # noqa: B008 (frozen)
    tokens = make_token_set("tiny", tiny_tokens(4), None, "test")
    grid = AllocatedGrid(sensitivity=sensitivity, group_size=32, windows=2)
    return allocate(model, tokens, Method("m", solver), grid, SMALL, model_sha256="weights", cache=cache)


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("sensitivity", ["error", "kl"])
def test_an_offloaded_models_costs_are_those_of_the_model_in_memory(opened, sensitivity, solver):
    model = opened()
    ours, theirs = allocation(model, sensitivity, solver), allocation(tiny_model("llama"), sensitivity, solver)
    assert [cost.name for cost in ours.costs] == [cost.name for cost in theirs.costs]
    for own, other in zip(ours.costs, theirs.costs, strict=True):
        assert own.costs == pytest.approx(other.costs, rel=1e-6)
    assert ours.chosen == theirs.chosen
    assert model.model.layers[0].mlp.up_proj.weight.isnan().all()  # it is away again


def test_gradients_through_an_offloaded_model_are_refused_before_calibration(opened, monkeypatch):
    monkeypatch.setattr("gptq_awq.allocation.sensitivity.Inputs", None)
    with pytest.raises(UserError, match=r"grid\.sensitivity=fisher.*offloaded.*grid\.sensitivity=error"):
        allocation(opened(), "fisher")


def test_an_offloaded_run_that_allocates_by_gradients_is_refused_at_once(cli, tiny):
    done = cli(*tiny, "grid=allocated", "stream=true", "method=gptq", "out=refused")
    assert done.returncode == 2
    assert "grid.sensitivity=fisher" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_offloaded_run_that_allocates_by_error_equals_one_in_memory(cli, tiny, tmp_path):
    rows = []
    for stream in ("true", "false"):
        options = ("grid=allocated", "grid.sensitivity=error", "grid.budget_bits=4.5", "method=gptq")
        cache = {"GPTQ_AWQ_CACHE": str(tmp_path / f"cache-{stream}")}
        done = cli(*tiny, *options, f"stream={stream}", f"out=stream-{stream}", **cache)
        assert done.returncode == 0, done.stderr
        ledger = (tmp_path / f"stream-{stream}" / "ledger.jsonl").read_text().splitlines()
        rows.append([(row["name"], row["codes_sha256"]) for row in map(json.loads, ledger)])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kept", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_is_never_kept_and_never_used(tmp_path, kept):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 3] = kept
    with pytest.raises(UserError, match="finite"):
        allocation(model, cache=tmp_path)
    assert not list((tmp_path / "sensitivities").glob("*.safetensors"))
    plain = allocation(tiny_model("llama"), cache=tmp_path)
    (path,) = (tmp_path / "sensitivities").glob("*.safetensors")
    content = ChecksummedFile.read(path)
    content.facts["costs"][0]["costs"][0] = kept
    content.write(path)
    assert allocation(tiny_model("llama"), cache=tmp_path).costs == plain.costs
    assert allocation(tiny_model("llama")).costs == plain.costs
