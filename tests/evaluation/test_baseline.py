import json
import logging
import threading

import pytest
import torch
from helpers.scored_models import disturb, plain_losses, windows
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.data.tokens import make_token_set
from gptq_awq.evaluation import baseline as baseline_module
from gptq_awq.evaluation.baseline import AnswersFile, baseline_scores, floor_path
from gptq_awq.evaluation.evaluate import full_precision, score


@pytest.fixture
def forbidden(monkeypatch):
    """After `forbidden()`, computing a baseline fails."""

    def fail(*_args):
        raise AssertionError("the baseline was computed")

    return lambda: monkeypatch.setattr(baseline_module, "token_losses", fail)


def files(folder):
    return [path for path in folder.iterdir() if path.name != ".locks"]


def same(a, b):
    return torch.equal(a.nll, b.nll) and torch.equal(a.hidden, b.hidden) and a.head_sha256 == b.head_sha256


def test_a_baseline_is_computed_once(tmp_path, forbidden):
    model, tokens = tiny_model("llama"), windows()
    first = baseline_scores(model, "weights", tokens, tmp_path)
    forbidden()
    assert same(baseline_scores(model, "weights", tokens, tmp_path), first)


def test_windows_of_another_length_have_baselines_and_floors_of_their_own(tmp_path, caplog):
    model, ids = tiny_model("llama"), tiny_tokens(4, 64)
    sets = [make_token_set("text", ids.view(rows, -1), None, "random") for rows in (4, 8)]
    plain = [baseline_scores(model, "weights", tokens, None) for tokens in sets]
    for tokens, expected in [*zip(sets, plain, strict=True)] * 2:
        assert same(baseline_scores(model, "weights", tokens, tmp_path), expected)
    assert "damaged" not in caplog.text
    assert len({floor_path(model, "weights", tokens, tmp_path, torch.bfloat16) for tokens in sets}) == 2


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    baseline_scores(tiny_model("llama"), "weights", windows(), None)
    assert not list(tmp_path.iterdir())


def test_half_precision_states_are_kept_bit_for_bit(tmp_path, forbidden):
    model, tokens = tiny_model("llama").half(), windows(1, 8)
    first = baseline_scores(model, "weights", tokens, tmp_path)
    forbidden()
    kept = baseline_scores(model, "weights", tokens, tmp_path)
    assert same(kept, first)
    assert kept.hidden.dtype == torch.float16


@pytest.mark.parametrize(
    ("weights", "dtype", "rows"), [("other", "float", 4), ("weights", "double", 4), ("weights", "float", 3)]
)
def test_another_model_dtype_or_text_has_another_baseline(tmp_path, weights, dtype, rows):
    baseline_scores(tiny_model("llama"), "weights", windows(), tmp_path)
    baseline_scores(getattr(tiny_model("llama"), dtype)(), weights, windows(rows), tmp_path)
    assert len(files(tmp_path)) == 2


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -5),
        lambda path: flip(path, 10),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["a bit of the data", "a bit of the header", "truncated", "empty"],
)
def test_a_damaged_baseline_is_never_used(tmp_path, damage, caplog, forbidden):
    model, tokens = tiny_model("llama"), windows()
    first = baseline_scores(model, "weights", tokens, tmp_path)
    (path,) = files(tmp_path)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert same(baseline_scores(model, "weights", tokens, tmp_path), first)
    assert "damaged" in caplog.text
    forbidden()  # and it was mended
    assert same(baseline_scores(model, "weights", tokens, tmp_path), first)
    assert files(tmp_path) == [path]


def answers(folder, weights="weights"):
    return AnswersFile.of(tiny_model("llama"), weights, None, folder)


def test_answers_are_kept_and_added_to(tmp_path):
    assert answers(tmp_path).read() == {}
    answers(tmp_path).add({"a": [-1.25, True]})
    answers(tmp_path).add({"b": -0.1})
    assert answers(tmp_path).read() == {"a": [-1.25, True], "b": -0.1}
    assert answers(tmp_path, "other").read() == {}


def test_answers_of_two_writers_at_once_are_all_kept(tmp_path):
    file = answers(tmp_path)
    writers = [threading.Thread(target=file.add, args=({str(i): float(i)},)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(file.read()) == 8


@pytest.mark.parametrize("text", ["", "[1]", '{"sha256": "0", "answers": {"a": 1}}', '{"answers": {}}'])
def test_damaged_answers_are_never_used(tmp_path, caplog, text):
    file = answers(tmp_path)
    file.add({"a": 1.0})
    file.path.write_text(text)
    assert file.read() == {}
    assert "damaged" in caplog.text


def test_metrics_are_those_of_an_independent_computation(tmp_path):
    model, tokens = tiny_model("llama"), windows(8, 128)
    full = plain_losses(model, tokens.ids)
    log_p = model(tokens.ids).logits[:, :-1].log_softmax(-1)
    baseline = full_precision(model, None, "weights", [tokens], cache_dir=tmp_path)
    disturb(model)
    metrics = score(model, None, baseline).metrics
    quantized, log_q = plain_losses(model, tokens.ids), model(tokens.ids).logits[:, :-1].log_softmax(-1)

    expected = {
        "text/ppl@128": quantized.mean().exp(),
        "text/ppl@128/baseline": full.mean().exp(),
        "text/ppl@128/delta": quantized.mean().exp() - full.mean().exp(),
        "text/dnll": (quantized - full).mean(),
        "text/kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "text/top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    for value, bounds in [
        ("text/ppl@128/delta", "text/ppl@128/delta_ci95"),
        *((name, f"{name}/ci95") for name in ("text/dnll", "text/kl", "text/top1_agreement")),
    ]:
        low, high = metrics[bounds]
        assert low < metrics[value] < high
    assert json.loads(json.dumps(metrics)) == metrics
    assert baseline.sha256 == {"text": tokens.sha256}


def test_full_precision_loses_nothing_against_itself():
    model, tokens = tiny_model("llama"), windows(8, 128)
    metrics = score(model, None, full_precision(model, None, "weights", [tokens])).metrics
    assert metrics["text/ppl@128/delta"] == metrics["text/dnll"] == 0
    assert metrics["text/ppl@128/delta_ci95"] == [0, 0]
    assert metrics["text/top1_agreement"] == 1
    assert metrics["text/kl"] == pytest.approx(0, abs=1e-6)


def test_too_few_tokens_give_no_interval(caplog):
    model, tokens = tiny_model("llama"), windows(2, 32)
    metrics = score(model, None, full_precision(model, None, "weights", [tokens])).metrics
    assert not any("ci95" in name for name in metrics)
    assert "eval.perplexity.windows" in caplog.text


def test_texts_of_one_name_are_refused():
    other = make_token_set("text", tiny_tokens(2, 8), None, "random")
    with pytest.raises(ValueError, match="share a name"):
        full_precision(tiny_model("llama"), None, "weights", [windows(), other])
