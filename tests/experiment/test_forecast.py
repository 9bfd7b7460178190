"""A forecast says what the run will take, and leaves the run as it would have been."""

import copy
import json

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import save_tiny_folder, tiny_model

from gptq_awq.calibration.block_inputs import calibration_of
from gptq_awq.experiment.forecasting.dry_run import with_blocks
from gptq_awq.experiment.forecasting.forecast import Forecast, PhaseForecast
from gptq_awq.models.blocks import find_blocks


@pytest.fixture
def ran(cli, tiny, tmp_path):
    def run(name: str, *options: str):
        done = cli(*tiny, *options, f"out={tmp_path / name}", GPTQ_AWQ_CACHE=str(tmp_path / f"cache-{name}"))
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "results.json").read_text())

    return run


@pytest.mark.parametrize("method", ["rtn", "awq", "quarot"])
def test_the_row_has_what_was_forecast_beside_what_was_taken(method, ran, tmp_path):
    row = ran(method, f"method={method}", "forecast=true")
    assert row["forecast"]["seconds"].keys() == row["seconds"].keys() - {"load", "forecast", "compile"}
    assert all(seconds >= 0 for seconds in row["forecast"]["parts"].values())
    assert row["forecast"]["seconds"]["total"] > row["seconds"]["load"]
    assert row["forecast"]["peak_memory_bytes"] == pytest.approx(row["peak_memory_bytes"], rel=0.2)
    log = (tmp_path / method / "run.log").read_text()
    assert "total: forecast" in log
    assert "peak memory: forecast" in log
    assert not list((tmp_path / f"cache-{method}" / "progress").glob(".forecast-*"))


@pytest.mark.parametrize("method", ["best"])
def test_a_forecast_changes_no_number(method, ran):
    with_, without = (ran(str(asked), f"method={method}", f"forecast={asked}") for asked in (True, False))
    assert with_["metrics"] == without["metrics"]
    assert "forecast" not in without


def test_a_finished_baseline_is_not_forecast_again(ran, tmp_path, cli, tiny):
    ran("first", "method=rtn")
    done = cli(
        *tiny, "method=gptq", "forecast=true", f"out={tmp_path / 'b'}", GPTQ_AWQ_CACHE=str(tmp_path / "cache-first")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b" / "results.json").read_text())["forecast"]["seconds"]["baseline"] == 0


@pytest.mark.parametrize(("name", "method"), [("mixtral", "gptq"), ("gpt2", "awq_gptq")])
def test_streamed_models_have_one_unasked(name, method, ran, tmp_path):
    folder = save_tiny_folder(tmp_path / "model", name)
    row = ran(name, f"model.path={folder}", f"method={method}", "stream=true", "export.formats=[hf]")
    assert row["forecast"]["seconds"]["quantize"] > 0
    assert row["forecast"]["seconds"]["export"] > 0


def test_parts_add_up_to_their_phase():
    phases = (PhaseForecast("baseline", 1, 5), PhaseForecast("quantize: a", 2, 7), PhaseForecast("quantize: b", 3, 6))
    row = Forecast(phases, begun=10).row()
    assert row["seconds"] == {"baseline": 1, "quantize": 5, "total": 16}
    assert row["peak_memory_bytes"] == 7


def test_a_model_with_other_blocks_shares_all_else_and_changes_nothing():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    before, ids = model(torch.arange(8)[None]).logits, torch.arange(8)[None]
    view = with_blocks(model, [copy.deepcopy(blocks[0])])
    assert len(find_blocks(view)[1]) == 1
    assert len(blocks) == 2
    assert view.get_input_embeddings() is model.get_input_embeddings()
    assert not torch.equal(view(ids).logits, before)
    assert torch.equal(with_blocks(model, list(blocks))(ids).logits, before)


def test_calibration_needs_more_with_more_tokens_and_full_precision_beside():
    model = tiny_model("llama")
    alone, beside = (calibration_of(model, tokens(), SMALL, full) for full in (False, True))
    assert alone.most < beside.most
    assert alone.lasting < calibration_of(model, tokens(24), SMALL, False).lasting
