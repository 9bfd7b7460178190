"""What the report calls different: tested on runs whose truth is known."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from gptq_awq.evaluation.scores import FILE_NAME, Scores
from gptq_awq.evaluation.statistics import TEST_RESAMPLES, bootstrap_tests, holm
from gptq_awq.report import verdicts as module
from gptq_awq.report.rows import Row, is_full_precision, measured
from gptq_awq.report.verdicts import Verdict, best_of_bits, higher_is_better, read_scores, verdicts

PPL, KL, AGREE, ACC = "text/ppl@256", "text/kl", "text/top1_agreement", "lm_eval/task/acc"
BLOCKS, TOKENS = 64, 128.0


class Runs:
    """Runs whose blocks are drawn around given means; all share the text's own difficulty."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.text = self.rng.normal(3, 1, BLOCKS)
        self.items = (self.rng.random(400) < 0.6).astype(float)
        self.rows: list[Row] = []
        self.arrays: dict[str, dict[str, np.ndarray]] = {}

    def add(
        self,
        path: str,
        loss: float,
        bits: float = 4,
        method: str = "gptq",
        flipped: int = 0,
        act: str | None = None,
        kv: str | None = None,
    ) -> None:
        noise = self.rng.normal(0, 0.05, BLOCKS)
        nll = self.text + loss + noise
        kl = np.abs(loss + noise)
        agree = np.clip(0.9 - loss + noise / 10, 0, 1)
        items = self.items.copy()
        items[:flipped] = 0
        self.arrays[path] = {
            "text/tokens": np.full(BLOCKS, TOKENS),
            "text/nll": nll * TOKENS,
            "text/nll/baseline": self.text * TOKENS,
            "text/kl": kl * TOKENS,
            "text/agree": agree * TOKENS,
            ACC: items,
            f"{ACC}/baseline": self.items,
        }
        delta = math.exp(nll.mean()) - math.exp(self.text.mean())
        metrics = {
            PPL: math.exp(nll.mean()),
            f"{PPL}/delta": delta,
            f"{PPL}/delta_ci95": [delta - 0.1, delta + 0.1],
            "text/dnll": (nll - self.text).mean(),
            KL: kl.mean(),
            AGREE: agree.mean(),
            ACC: items.mean(),
        }
        row = {"path": path, "method": method, "bits": bits, "bits_per_weight": bits, "metrics": metrics}
        self.rows.append(row | {"act": act, "kv": kv})

    def verdicts(self):
        return verdicts(self.rows, lambda path: self.arrays.get(path, {}))


def test_against_full_precision_the_loss_is_tested_on_blocks_and_items_by_mcnemar():
    runs = Runs()
    runs.add("a", loss=0.01, flipped=30)
    found = runs.verdicts()
    differences = runs.arrays["a"]["text/nll"] - runs.arrays["a"]["text/nll/baseline"]
    expected = ttest_1samp(differences, 0).pvalue
    assert 0.01 < expected < 0.5  # where resamples can be counted: their share has a binomial's standard deviation
    deviation = math.sqrt(expected * (1 - expected) / TEST_RESAMPLES)
    assert found["a", PPL].p == pytest.approx(expected, abs=4 * deviation)
    lost = int((runs.items - runs.arrays["a"][ACC]).sum())
    assert found["a", ACC].p == pytest.approx(binomtest(0, lost).pvalue)
    assert found["a", PPL] == found["a", "text/dnll"]  # one test: perplexity is a function of the loss
    assert found["a", KL].p is None  # full precision has no KL to differ from


def test_holm_counts_every_test_of_the_table_once():
    runs = Runs()
    for name, loss in (("a", 0.0), ("b", 0.01), ("c", 0.05)):
        runs.add(name, loss, bits={"a": 8, "b": 4, "c": 3}[name], flipped=5)
    found = runs.verdicts()
    tested = [(path, name) for path in "abc" for name in (PPL, ACC)]
    assert [found[key].p_holm for key in tested] == pytest.approx(holm([found[key].p or 0 for key in tested]))


def test_equal_runs_are_not_distinguishable_and_unequal_ones_are():
    runs = Runs()
    runs.add("nothing", loss=0.0, bits=8)
    runs.add("something", loss=0.1, bits=4)
    found = runs.verdicts()
    assert found["nothing", PPL].same
    assert not found["something", PPL].same


def test_within_bits_others_are_compared_with_the_best():
    runs = Runs()
    runs.add("best", loss=0.1, method="gptq")
    runs.add("near", loss=0.101, method="awq")
    runs.add("far", loss=0.3, method="rtn", flipped=100)
    runs.add("other bits", loss=0.02, bits=8)
    found = runs.verdicts()
    best = min(("best", "near"), key=lambda path: next(r for r in runs.rows if r["path"] == path)["metrics"][PPL])
    near = ({"best", "near"} - {best}).pop()
    assert found[best, PPL].best
    assert found[best, PPL].p_best is None
    assert found[near, PPL].ties
    assert not found["far", PPL].ties
    assert not found["far", ACC].ties
    assert found["other bits", PPL] == Verdict(found["other bits", PPL].p, found["other bits", PPL].p_holm)


def test_the_best_of_agreement_and_accuracy_is_the_highest():
    runs = Runs()
    runs.add("good", loss=0.05)
    runs.add("bad", loss=0.3, flipped=50)
    assert {name for (path, name), verdict in runs.verdicts().items() if verdict.best} == {
        *(PPL, "text/dnll", KL, AGREE, ACC)
    }
    assert all(run["path"] == "good" for run, _ in best_of_bits(runs.rows).values())
    for name, higher in {
        **{PPL: False, "lm_eval/wikitext/word_perplexity": False, "lm_eval/x/bits_per_byte": False, KL: False},
        **{AGREE: True, ACC: True, "lm_eval/hellaswag/acc_norm": True, "lm_eval/gsm8k/exact_match,strict": True},
    }.items():
        assert higher_is_better(name) is higher, name


def test_full_precision_and_what_did_not_come_out_as_a_number_compete_with_nobody():
    runs = Runs()
    runs.add("full", loss=0.0, bits=16, method="fp")
    runs.add("bf16", loss=0.001, bits=16, method="bf16")
    runs.add("broken", loss=0.1, bits=2)
    runs.rows[2]["metrics"][PPL] = math.nan
    runs.add("whole", loss=0.2, bits=2)
    assert not any(verdict.best for (_, name), verdict in runs.verdicts().items() if name == PPL)


def test_runs_compete_where_activations_and_cache_are_rounded_alike():
    runs = Runs()
    losses = {"gptq": 0.1, "rtn": 0.3}
    alike = [(None, None), ("int8", None), ("int4", None), (None, "int4"), ("int8", "int4")]
    for index, (act, kv) in enumerate(alike):
        for method, loss in losses.items():
            runs.add(f"{method} {index}", loss + index, method=method, act=act, kv=kv)
    runs.add("alone", 9.0, act="int6")
    found = runs.verdicts()
    assert {path for (path, name), verdict in found.items() if verdict.best} == {f"gptq {i}" for i in range(5)}
    assert len(best_of_bits(runs.rows)) == 5 * len(measured(runs.rows[0]["metrics"]))
    compared = {path for (path, _), verdict in found.items() if verdict.p_best is not None}
    assert compared == {f"rtn {i}" for i in range(5)}


def test_rounded_activations_alone_are_not_full_precision():
    rounded = ({}, {"act": "int8"}, {"kv": "int4"}, {"act": "int8", "kv": "int4"})
    assert [is_full_precision({"method": "fp"} | each) for each in rounded] == [True, False, False, False]
    assert not is_full_precision({"method": "gptq"})
    runs = Runs()
    for path, loss in (("a", 0.1), ("b", 0.2)):
        runs.add(path, loss, bits=16, method="fp", act="int8")
    runs.add("full", loss=0.0, bits=16, method="fp")
    runs.add("full again", loss=0.01, bits=16, method="fp")
    found = runs.verdicts()
    assert found["a", PPL].best
    assert found["b", PPL].p_best is not None
    assert not found["full", PPL].best


def test_without_scores_the_interval_decides_and_the_best_is_not_compared():
    runs = Runs()
    runs.add("a", loss=0.001)
    runs.add("b", loss=0.2)
    runs.arrays.clear()
    found = runs.verdicts()
    assert found["a", PPL] == Verdict(same=True, best=True)
    assert found["b", PPL] == Verdict()


def test_equal_runs_seldom_differ_from_the_best_of_them(monkeypatch):
    """The best was chosen by looking: with plain Holm, eight equal runs disagree in 13% of tables."""
    monkeypatch.setattr(module, "bootstrap_tests", lambda d, weights: bootstrap_tests(d, weights, 1000))
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        nll = {str(path): rng.normal(3, 1, BLOCKS) * TOKENS for path in range(8)}
        arrays = {path: {"text/nll": x, "text/tokens": np.full(BLOCKS, TOKENS)} for path, x in nll.items()}
        rows = [
            {"path": path, "method": "m", "bits": 4, "bits_per_weight": 4, "metrics": {PPL: x.mean()}}
            for path, x in nll.items()
        ]
        found = verdicts(rows, arrays.__getitem__).values()
        alarms += any(v.p_best_holm is not None and v.p_best_holm < 0.05 for v in found)
    assert alarms <= 16


def test_damaged_scores_are_said_and_not_used(tmp_path, caplog):
    assert read_scores(str(tmp_path)) == {}
    assert not caplog.text
    Scores({"text/nll": np.ones(3)}).write(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"PK\x03\x04 torn")
    assert read_scores(str(tmp_path)) == {}
    assert str(tmp_path) in caplog.text
