"""Laws of token metrics: chosen by name, independent of one another, and added from outside as the docs say."""

import os
import re
import shlex
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers.forked import call_run
from helpers.paths import CONFIGS, ROOT
from helpers.scored_models import disturb, windows
from helpers.tiny_models import tiny_model
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from gptq_awq import results
from gptq_awq.errors import UserError
from gptq_awq.evaluation import head as head_module
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.floor import Floor
from gptq_awq.evaluation.metrics.base import LogitMetric, MeanMetric, TokenMetric
from gptq_awq.evaluation.metrics.choice import STANDARD, EvaluationText
from gptq_awq.evaluation.metrics.kl import KL
from gptq_awq.evaluation.metrics.ppl import TokenPerplexity
from gptq_awq.evaluation.protocol import Evaluation
from gptq_awq.evaluation.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Worst(TokenMetric):
    """The largest KL: no mean, so it has no interval."""

    name: str = "worst"

    def values(self, tokens):
        return {"": float(tokens.kl.max())}


@dataclass(frozen=True, kw_only=True)
class Surprise(MeanMetric):
    """The mean square of the loss."""

    name: str = "surprise"

    def per_token(self, tokens):
        return tokens.nll**2


@dataclass(frozen=True, kw_only=True)
class KLOfLogits(LogitMetric):
    """The KL once more, from whole rows of logits."""

    name: str = "kl_again"

    def of_logits(self, full, quantized, targets):
        log_p, log_q = full.log_softmax(-1), quantized.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class LossOfLogits(LogitMetric):
    """The quantized model's loss, which needs the targets."""

    name: str = "loss_again"

    def of_logits(self, full, quantized, targets):
        return -quantized.log_softmax(-1).gather(1, targets[:, None])[:, 0]


OWN = (Worst(), Surprise(), KLOfLogits(), LossOfLogits())


def scored(metrics, floors=None):
    """Scores of a disturbed model, measured by `metrics` (None: a plain token set)."""
    model, tokens = tiny_model("llama"), windows(10, 128)
    tokens = tokens if metrics is None else EvaluationText.of(tokens, metrics)
    baseline = replace(full_precision(model, None, "weights", [tokens]), floors=floors or {})
    disturb(model)
    return score(model, None, baseline)


@pytest.fixture(scope="module")
def plain():
    return scored(None)


def test_a_plain_token_set_gets_the_standard_metrics_in_order(plain):
    ppl = [f"text/ppl@128{suffix}" for suffix in ("", "/baseline", "/delta")]
    intervals = ["text/ppl@128/delta_ci95", "text/dnll/ci95", "text/kl/ci95", "text/top1_agreement/ci95"]
    assert list(plain.metrics) == [*ppl, "text/dnll", "text/kl", "text/top1_agreement", *intervals]
    assert set(plain.scores.arrays) == {f"text/{key}" for key in ("tokens", "nll", "nll/baseline", "kl", "agree")}


def test_metrics_of_ones_own_change_no_other_number(plain):
    found = scored((*STANDARD, *OWN))
    assert {key: found.metrics[key] for key in plain.metrics} == plain.metrics
    assert all(np.array_equal(found.scores.arrays[key], values) for key, values in plain.scores.arrays.items())
    assert set(found.metrics) - set(plain.metrics) == {
        *("text/worst", "text/surprise", "text/surprise/ci95", "text/kl_again", "text/kl_again/ci95"),
        *("text/loss_again", "text/loss_again/ci95"),
    }


def test_a_part_of_the_metrics_has_the_same_numbers(plain):
    found = scored((KL(), TokenPerplexity()))
    assert {key.split("/")[1] for key in found.metrics} == {"kl", "ppl@128"}
    assert all(plain.metrics[key] == value for key, value in found.metrics.items())
    assert set(found.scores.arrays) == set(plain.scores.arrays)


def test_a_mean_has_its_interval_and_its_block_sums():
    found = scored((Surprise(),))
    low, high = found.metrics["text/surprise/ci95"]
    assert low < found.metrics["text/surprise"] < high
    arrays = found.scores.arrays
    mean = arrays["text/surprise"].sum() / arrays["text/tokens"].sum()
    assert mean == pytest.approx(found.metrics["text/surprise"])


def test_a_metric_of_logits_sees_both_models_and_the_targets_whatever_the_chunk(plain, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 5 * 64)
    found = scored((KLOfLogits(), LossOfLogits()))
    assert found.metrics["text/kl_again"] == pytest.approx(plain.metrics["text/kl"], rel=1e-4)
    assert found.metrics["text/kl_again/ci95"] == pytest.approx(plain.metrics["text/kl/ci95"], rel=1e-4)
    assert found.metrics["text/loss_again"] == pytest.approx(np.log(plain.metrics["text/ppl@128"]), rel=1e-5)


def test_a_noise_floor_stands_below_its_metric_only():
    floors = {"text": Floor(1e-4, -2e-4)}
    assert scored((KL(),), floors).metrics["text/kl/floor"] == 1e-4
    assert not any("floor" in key for key in scored((TokenPerplexity(),), floors).metrics)


@pytest.mark.parametrize("metric", [Surprise, LossOfLogits])
def test_a_value_that_is_not_per_token_is_refused(metric, monkeypatch):
    name = "of_logits" if metric is LossOfLogits else "per_token"
    monkeypatch.setattr(metric, name, lambda *_: torch.tensor(1.0))
    with pytest.raises(TypeError, match=metric().name):
        scored((metric(),))


@pytest.mark.parametrize(
    ("available", "names", "message"),
    [
        ({"kl": KL()}, ["kl", "lk"], r"eval\.metrics=lk: choose among kl"),
        ({"a": KL(), "b": KL()}, None, r"eval\.metric: 2 metrics have name=kl"),
        ({"a": Surprise(name="agree")}, None, r"name=agree is that of another array"),
        ({"a": Surprise(name="a/b")}, None, r"name=a/b must not contain a slash"),
    ],
)
def test_wrong_metrics_are_refused_before_anything_is_loaded(available, names, message):
    with pytest.raises(UserError, match=message):
        Evaluation(metric=available, metrics=names)


@pytest.mark.parametrize("choice", ["ppl", "full"])
def test_metrics_are_chosen_by_name_on_the_command_line(choice):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[f"eval={choice}", "eval.metrics=[kl,ppl]"])
    evaluation = instantiate(cfg.eval, _convert_="all")
    assert evaluation.metrics == ["kl", "ppl"]
    # STANDARD is also what a stored config without metrics stands for.
    assert tuple(metric for name, metric in evaluation.metric.items() if name != "kl_tail") == STANDARD


def test_the_worked_examples_of_the_docs_run_as_written(tmp_path, tiny_folder, tiny_text, forks):
    page = (ROOT / "docs" / "add_a_metric.md").read_text()
    files = re.findall(r"`(\S+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    assert len(files) == 4
    for name, content in files:
        path = tmp_path / "my_metrics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (command,) = re.findall(r"```bash\nPYTHONPATH=my_metrics python run.py (.*?)\n```", page)
    arguments = [
        *shlex.split(command),
        *("group_size=16", "model=local", f"model.path={tiny_folder}", f"eval.perplexity.path={tiny_text}"),
        *("eval.perplexity.seqlen=64", "eval.perplexity.windows=16", f"out={tmp_path / 'out'}"),
    ]
    environment = os.environ | {"PYTHONPATH": "my_metrics", "GPTQ_AWQ_CACHE": str(tmp_path / "cache")}
    done = call_run(arguments, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = results.load(tmp_path / "out").iloc[0]["metrics"]
    assert metrics["tiny/kl_p99"] > metrics["tiny/kl"] > 0
    low, high = metrics["tiny/flip_rate/ci95"]
    assert 0 <= low <= metrics["tiny/flip_rate"] <= high < 1 - metrics["tiny/top1_agreement"] + 0.1
    assert "tiny/flip_rate" in Scores.read(tmp_path / "out").arrays
    assert "kl_p99" in done.stdout
