"""Laws of lower precision: products alone are lowered, its noise is measured first, and nothing is mixed up."""

import json
import logging

import pytest
import torch
from helpers.scored_models import disturb, windows
from helpers.tiny_models import tiny_model

from gptq_awq.errors import UserError
from gptq_awq.evaluation import evaluate as evaluate_module
from gptq_awq.evaluation import floor as floor_module
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.floor import MAX_KL, MAX_LOSS_CHANGE, Floor, floor
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.precision import FEW_ROWS, lowered
from gptq_awq.evaluation.protocol import Evaluation

BF16 = torch.bfloat16


def test_float32_changes_nothing():
    x, w = torch.randn(40, 16), torch.randn(8, 16)
    with lowered(torch.float32):
        assert torch.equal(torch.nn.functional.linear(x, w), x @ w.T)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_lowered_product_rounds_no_more_than_inputs_weights_and_output_and_sums_in_float32(dtype):
    torch.manual_seed(0)
    x, w, b = torch.randn(64, 512), torch.randn(24, 512), torch.randn(24)
    with lowered(dtype):
        found = torch.nn.functional.linear(x, w, b)
        conv1d = torch.addmm(b, x, w.T)
    exact = x.to(dtype).double() @ w.to(dtype).double().T + b.to(dtype).double()
    assert found.dtype == torch.float32
    epsilon = torch.finfo(dtype).eps  # twice the largest rounding error of one number
    assert ((found - exact).abs() <= epsilon * (exact.abs() + b.abs()) + 1e-4).all()
    torch.testing.assert_close(conv1d, found, rtol=epsilon, atol=1e-4)


def test_all_else_stays_float32():
    x = torch.randn(64, 64)
    with lowered(BF16):
        for plain in (lambda: x @ x, lambda: x.softmax(-1), lambda: torch.nn.functional.silu(x)):
            found = plain()
            assert found.dtype == torch.float32
    assert torch.equal(found, torch.nn.functional.silu(x))


def test_few_rows_and_other_dtypes_are_left_alone():
    x, w = torch.randn(FEW_ROWS - 1, 64), torch.randn(8, 64)
    with lowered(BF16):
        assert torch.equal(torch.nn.functional.linear(x, w), x @ w.T)
        doubles = torch.nn.functional.linear(x.double().repeat(2, 1), w.double())
    assert doubles.dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_lower_precision_moves_a_model_a_little(name):
    model, ids = tiny_model(name), windows(1, 64).ids
    before = Head.of(model).hidden(ids)
    lower = Head.of(model, BF16).hidden(ids)
    assert lower.dtype == torch.float32
    distance = ((lower - before).norm() / before.norm()).item()
    assert 1e-5 < distance < 3e-2
    assert torch.equal(Head.of(model).hidden(ids), before)


def test_the_floor_is_the_divergence_of_a_model_from_itself():
    model, tokens = tiny_model("llama"), windows(4, 64)
    model.lm_head.weight.mul_(30)  # a random model is sure of nothing, and nothing moves it
    found = floor(model, tokens, BF16)
    heads = [Head.of(model, dtype) for dtype in (torch.float32, BF16)]
    logits = [torch.stack([head(states[:-1]) for states in head.hidden(tokens.ids)]) for head in heads]
    log_p, log_q = (x.double().log_softmax(-1) for x in logits)
    nll = [-x.gather(-1, tokens.ids[:, 1:, None].long()).mean() for x in (log_p, log_q)]
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-2)
    assert found.kl > 0
    assert found.dnll == pytest.approx((nll[1] - nll[0]).item(), abs=1e-6)
    assert floor(model, tokens, torch.float32) == Floor(0, 0)


def test_a_floor_takes_windows_worth_its_tokens(monkeypatch):
    monkeypatch.setattr(floor_module, "TRIAL_TOKENS", 100)
    model, tokens = tiny_model("llama"), windows(8, 32)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    floor(model, tokens, BF16)
    assert seen.count(32) == 2 * 4  # four windows, each in both precisions


@pytest.mark.parametrize(
    ("kl", "dnll", "trusted"),
    [
        (0, 0, True),
        (MAX_KL, -MAX_LOSS_CHANGE, True),
        (MAX_KL * 1.01, 0, False),
        (0, -1.01 * MAX_LOSS_CHANGE, False),
        (float("nan"), 0, False),
        (0, float("inf"), False),
    ],
)
def test_small_finite_floors_are_trusted(kl, dnll, trusted):
    assert Floor(kl, dnll).trusted is trusted


def test_both_models_are_scored_in_the_lower_precision_and_its_floor_is_told():
    model, tokens = tiny_model("llama"), windows(8, 128)
    baseline = full_precision(model, None, "w", [tokens], compute_dtype="bfloat16")
    assert baseline.compute_dtype == BF16
    metrics = score(model, None, baseline).metrics
    assert metrics["text/dnll"] == metrics["text/kl"] == 0  # the same forwards: no noise between them
    assert metrics["text/kl/floor"] == floor(model, tokens, BF16).kl > 0
    plain = full_precision(model, None, "w", [tokens])
    assert not torch.equal(plain.scores[0].nll, baseline.scores[0].nll)
    assert not any("floor" in name for name in score(model, None, plain).metrics)


@pytest.mark.parametrize(("noise", "dtype"), [(Floor(1e-5, 1e-5), BF16), (Floor(0.1, 0), torch.float32)])
def test_auto_takes_what_it_can_trust(monkeypatch, caplog, noise, dtype):
    monkeypatch.setattr(evaluate_module, "resolve_compute_dtype", lambda *_: BF16)
    monkeypatch.setattr(floor_module, "floor", lambda *_: noise)
    with caplog.at_level(logging.INFO):
        baseline = full_precision(tiny_model("llama"), None, "w", [windows()], compute_dtype="auto")
    assert baseline.compute_dtype == dtype
    assert ("not trusted on text" in caplog.text) == (dtype == torch.float32)
    assert len([r for r in caplog.records if "text" in r.getMessage()]) == 1


def test_auto_without_a_text_to_try_is_float32(monkeypatch, caplog):
    monkeypatch.setattr(evaluate_module, "resolve_compute_dtype", lambda *_: BF16)
    with caplog.at_level(logging.INFO):
        assert full_precision(tiny_model("llama"), None, "w", [], compute_dtype="auto").compute_dtype == torch.float32
    assert "no text" in caplog.text


def test_weights_of_16_bits_are_computed_with_as_they_are():
    baseline = full_precision(tiny_model("llama").half(), None, "w", [windows(1, 8)], compute_dtype="bfloat16")
    assert (baseline.compute_dtype, baseline.floors) == (torch.float32, {})


def test_precisions_have_baselines_and_floors_of_their_own(tmp_path, monkeypatch):
    model, tokens = tiny_model("llama"), windows()
    for name, files in (("float32", 1), ("bfloat16", 3), ("float32", 3), ("bfloat16", 3)):
        baseline = full_precision(model, None, "w", [tokens], cache_dir=tmp_path, compute_dtype=name)
        kept = [path for path in (tmp_path / "baselines").iterdir() if path.is_file()]
        assert len(kept) == files
    monkeypatch.setattr(floor_module, "floor", None)  # read, not measured again
    again = full_precision(model, None, "w", [tokens], cache_dir=tmp_path, compute_dtype="bfloat16")
    assert again.floors == baseline.floors
    disturb(model)
    assert score(model, None, again).metrics["text/kl"] > 0


def test_an_unknown_precision_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"compute_dtype=int8: give auto or one of float32"):
        Evaluation(compute_dtype="int8")


def test_a_run_says_in_what_precision_it_was_scored(cli, tiny, tmp_path):
    done = cli("method=rtn", "bits=4", *tiny, "eval.compute_dtype=bfloat16", "out=run")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run/results.json").read_text())
    assert row["manifest"]["eval_dtype"] == "torch.bfloat16"
    (name,) = {name.partition("/")[0] for name in row["metrics"]}
    assert 0 < row["metrics"][f"{name}/kl/floor"] < row["metrics"][f"{name}/kl"]
