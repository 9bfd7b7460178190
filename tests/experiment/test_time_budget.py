"""Laws of a time budget: the strongest recipe that is expected to keep to it is chosen, said, and chosen again."""

import json

import pytest
from helpers.paths import CONFIGS
from hydra import compose, initialize_config_dir

from gptq_awq.errors import UserError
from gptq_awq.experiment import time_budget
from gptq_awq.experiment.context import load
from gptq_awq.experiment.forecasting.allocating import allocation_seconds
from gptq_awq.experiment.plan import preflight
from gptq_awq.experiment.time_budget import Choice, _with_recipe, seconds_of, within_budget
from gptq_awq.numerics.distributed import ONE
from gptq_awq.runtime.fingerprint import config_sha256

SECONDS = {"best": 100.0, "fast": 30.0, "rtn": 1.0}


@pytest.fixture
def composed(tiny, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(cache))

    def build(*options):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", overrides=[*tiny, f"out={tmp_path / 'out'}", *options])

    return build


@pytest.fixture
def forecasts(monkeypatch):
    """Methods that were forecast, with made-up seconds."""
    asked = []

    def seconds(plan, _context):
        asked.append(plan.method.name)
        return SECONDS[plan.method.name]

    monkeypatch.setattr(time_budget, "forecast_seconds", seconds)
    return asked


@pytest.mark.parametrize(("text", "seconds"), [("5min", 300), ("90s", 90), ("1.5h", 5400), (30, 30), ("2 m", 120)])
def test_a_budget_is_a_time_in_any_usual_spelling(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "5 apples", "0", "-3min", "1.2.3s"])
def test_what_is_no_time_is_refused_by_name(text):
    with pytest.raises(UserError, match="time_budget="):
        seconds_of(text)


@pytest.mark.parametrize(("budget", "chosen"), [("2min", "best"), ("40s", "fast"), ("2s", "rtn"), ("0.5s", "rtn")])
def test_the_strongest_recipe_that_fits_is_the_method(budget, chosen, composed, forecasts):
    said = []
    cfg = within_budget(composed(f"time_budget={budget}", "recipes=[best,fast,rtn]"), ONE, said.append)
    assert cfg.method.name == chosen
    assert f"method={chosen}" in said[-1]
    for stronger in list(SECONDS)[: list(SECONDS).index(chosen)]:
        assert f"{stronger} would take" in said[-1]
    assert forecasts == list(SECONDS)[: len(forecasts)], "weaker recipes than the chosen one need no dry run"


def test_the_run_is_the_one_that_the_recipe_by_name_would_be(composed, forecasts):
    cfg = within_budget(composed("time_budget=40s", "recipes=[best,fast,rtn]"), ONE, print)
    by_name = composed("method=fast")
    assert config_sha256(cfg) == config_sha256(by_name)


def test_a_recipe_with_a_grid_is_the_run_that_both_by_name_would_be(composed, forecasts):
    said = []
    cfg = within_budget(composed("time_budget=40s", "bits=3", "recipes=[fast+mixed,rtn]"), ONE, said.append)
    assert "method=fast grid=mixed" in said[-1]
    assert config_sha256(cfg) == config_sha256(composed("method=fast", "grid=mixed", "bits=3"))


def test_a_grid_of_the_users_own_is_kept(composed, forecasts):
    cfg = within_budget(composed("time_budget=40s", "grid=nf4", "recipes=[fast+mixed,fast,rtn]"), ONE, print)
    assert (cfg.method.name, cfg.grid.table) == ("fast", "nf4")
    with pytest.raises(UserError, match="and so has the run"):
        within_budget(composed("time_budget=40s", "grid=nf4", "recipes=[fast+mixed]"), ONE, print)


def test_a_grid_that_a_format_does_not_hold_is_passed_over_and_said(composed, forecasts):
    said = []
    options = ("time_budget=40s", "recipes=[fast+mixed,fast,rtn]", "export.formats=[gptq]")
    assert within_budget(composed(*options), ONE, said.append).method.name == "fast"
    assert "not fast+mixed: export.formats=gptq" in said[0]


def test_finding_widths_is_in_the_forecast_until_they_are_known(composed, cli, tiny, cache):
    options = ("method=gptq", "grid=mixed", "group_size=32", "grid.group_sizes=[16,32]")

    def seconds():
        cfg = composed(*options)
        plan = preflight(_with_recipe(cfg, "gptq"))
        return allocation_seconds(plan, load(plan))

    assert seconds() > 0
    done = cli(*tiny, *options, GPTQ_AWQ_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert seconds() == 0


def test_the_same_command_chooses_the_same_recipe_though_the_machine_is_slower_now(composed, forecasts, monkeypatch):
    options = ("time_budget=40s", "recipes=[best,fast,rtn]")
    first = within_budget(composed(*options), ONE, print)
    monkeypatch.setattr(time_budget, "forecast_seconds", lambda *_: 1e9)
    assert within_budget(composed(*options), ONE, print).method == first.method
    assert within_budget(composed(*options, "resume=false"), ONE, print).method.name == "rtn"


def test_a_choice_among_other_recipes_is_another_choice(composed, forecasts):
    for recipes, chosen in (("[best,fast,rtn]", "fast"), ("[best,rtn]", "rtn")):
        assert within_budget(composed("time_budget=41s", f"recipes={recipes}"), ONE, print).method.name == chosen


def test_a_recipe_that_cannot_be_used_here_is_passed_over_and_said(composed, forecasts):
    said = []
    options = ("time_budget=1h", "recipes=[best_3bit,fast]")  # windows are no longer than the prompt of what is written
    assert within_budget(composed(*options), ONE, said.append).method.name == "fast"
    assert "not best_3bit: method.self_calibration" in said[0]


@pytest.mark.parametrize(
    ("recipes", "message"),
    [("[]", "name the recipes"), ("[fast,besst]", "no method=besst"), ("[fast+mixxed]", "no grid=mixxed")],
)
def test_recipes_that_are_not_there_are_refused(recipes, message, composed, forecasts):
    with pytest.raises(UserError, match=message):
        within_budget(composed("time_budget=1min", f"recipes={recipes}"), ONE, print)


def test_without_a_budget_nothing_is_chosen(composed, forecasts):
    cfg = composed("method=gptq")
    assert within_budget(cfg, ONE, print) is cfg
    assert forecasts == []


def test_a_tiny_model_is_not_expected_to_take_minutes(composed):
    plan = preflight(_with_recipe(composed("method=gptq"), "gptq"))
    assert time_budget.forecast_seconds(plan, load(plan)) < 100  # nothing is written, so no time goes to the disk


def test_times_are_told_in_minutes_from_two_on():
    told = Choice("fast", {"best": 900.0, "fast": 50.0}).told("1min")
    assert told == "time_budget=1min: method=fast, about 50 s (best would take 15 min)"


def test_a_budget_on_the_command_line_ends_in_a_row_of_the_chosen_method(cli, tiny, tmp_path):
    options = ("method=best", "time_budget=10min", "recipes=[yaqa,rtn]", f"out={tmp_path / 'a'}")
    done = cli(*tiny, *options)
    assert done.returncode == 0, done.stderr
    assert "method=yaqa, about" in done.stderr
    row = json.loads((tmp_path / "a" / "results.json").read_text())
    assert row["method"] == "yaqa"
