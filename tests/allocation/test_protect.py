"""Laws of linears that stay in full precision: those of a list, and the sites that rounding costs most."""

import json

import pytest
import torch
from helpers.mixtures import GRID as EXPERTS_GRID
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.quantized_weights import NoTokenizer
from helpers.tiny_models import tiny_model

from gptq_awq import quantize_model
from gptq_awq.allocation.protect import protected
from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.protected import ProtectedGrid
from gptq_awq.models.linear import KEPT
from gptq_awq.models.unfuse import unfuse

VALUES = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant_gptq", "qronos", "quarot", "fast"])
def test_what_is_protected_is_in_full_precision_and_all_else_is_rounded(method):
    model, full = tiny_model("llama"), tiny_model("llama")
    grid = ProtectedGrid(GRID, ["*.v_proj", r"re:.*layers\.0\.mlp\.(gate|up)_proj"])
    done = quantize_model(model, tokens(), method, grid=grid, settings=SMALL)
    kept = {row["name"] for row in done.ledger if row.get("left") == KEPT}
    assert kept == {*VALUES, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert len(done.weights) + len(kept) == 2 * 7
    assert {row["name"] for row in done.ledger} == kept | set(done.weights)
    if method in ("rtn", "gptq", "qronos"):  # the others rewrite weights, without rounding them
        for name in kept:
            assert torch.equal(model.get_submodule(name).weight, full.get_submodule(name).weight)


def test_with_all_but_one_protected_only_that_one_is_what_gptq_makes_of_it_alone():
    alone = quantize_model(tiny_model("llama"), tokens(), "gptq", grid=GRID, settings=SMALL)
    grid = ProtectedGrid(GRID, [r"re:(?!.*layers\.0\.self_attn\.q_proj).*"])
    done = quantize_model(tiny_model("llama"), tokens(), "gptq", grid=grid, settings=SMALL)
    (name,) = done.weights
    assert torch.equal(done.weights[name].codes, alone.weights[name].codes)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"protect=\*\.x_proj: the model has no such linear"):
        quantize_model(tiny_model("llama"), tokens(), "rtn", grid=ProtectedGrid(GRID, ["*.v_proj", "*.x_proj"]))


def test_auto_keeps_the_sites_that_rounding_costs_most_and_no_more_than_the_share():
    model, share = tiny_model("llama"), 0.06
    for block in (1, 0):
        with torch.no_grad():
            model.model.layers[block].self_attn.o_proj.weight[:, 0] *= 100  # spreads the grid of each row's first group
        found = protected(model, tokens(), ProtectedGrid(GRID, "auto", share), SMALL)
        assert list(found.kept) == [f"model.layers.{block}.self_attn.o_proj"]
        assert 0 < found.share <= share
        with torch.no_grad():
            model.model.layers[block].self_attn.o_proj.weight[:, 0] /= 100
    assert found.predicted < found.before
    assert found.before - found.predicted == pytest.approx(sum(found.kept.values()))
    none = protected(model, tokens(), ProtectedGrid(GRID, "auto", 0.001), SMALL)
    assert not none.kept
    everything = protected(model, tokens(), ProtectedGrid(GRID, "auto", 1.0), SMALL)
    assert len(everything.kept) == 2 * 7
    assert everything.predicted == pytest.approx(0, abs=1e-9)


def test_sites_stay_whole_and_the_experts_of_a_block_together():
    model = tiny_model("mixtral")
    unfuse(model)
    for share in (0.05, 0.3, 0.6):
        kept = protected(model, tokens(), ProtectedGrid(EXPERTS_GRID, "auto", share), SMALL).kept
        for block in (0, 1):
            own = [name for name in kept if f".{block}." in name]
            assert sum("self_attn" in n and not n.endswith("o_proj") for n in own) in (0, 3)
            assert sum("experts" in n for n in own) in (0, 2 * 4)


def test_a_run_stores_what_auto_protected_and_goes_by_it(cli, tiny, tmp_path):
    options = ["method=rtn", "bits=3", "protect=auto", "protect_share=0.2", "export.formats=[compressed_tensors]"]
    done = cli(*tiny, *options, "group_size=32", "sym=true", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "results.json").read_text())["manifest"]
    kept = manifest["protected"]["linears"]
    assert kept
    assert manifest["coverage"]["share"] == pytest.approx(1 - manifest["protected"]["share"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows if row.get("left") == KEPT} == set(kept)
    assert "stay in full precision" in " ".join(done.stderr.split())
    config = json.loads((tmp_path / "out" / "checkpoints" / "compressed_tensors" / "config.json").read_text())
    assert set(kept) <= set(config["quantization_config"]["ignore"])


def test_a_grid_with_a_budget_protects_nothing(cli, tiny, tmp_path):
    done = cli("method=rtn", "grid=mixed", "protect=auto", *tiny, f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "a grid with a budget spends it where rounding costs most" in " ".join(done.stderr.split())


@pytest.mark.parametrize("format_", [GPTQFormat(), CompressedTensorsFormat()], ids=lambda made: made.name)
def test_exports_list_what_is_protected(format_, tmp_path):
    grid = ProtectedGrid(IntGrid(4, 32, sym=True, scale_dtype="float16"), ["*.v_proj"])
    done = quantize_model(tiny_model("llama"), None, "rtn", grid=grid)
    format_.write(Source(done.model, NoTokenizer(), "tiny", done.weights), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    if format_.name == "gptq":
        assert sorted(config["dynamic"]) == [rf"-:^model\.layers\.{i}\.self_attn\.v_proj$" for i in (0, 1)]
        (packed,) = config["modules_in_block_to_quantize"]
        assert set(packed) == set(done.weights)
    else:
        assert set(VALUES) <= set(config["ignore"])
