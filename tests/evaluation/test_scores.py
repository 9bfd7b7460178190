"""Laws of scores.npz: what a later test between runs needs is kept, whole, and the same each time."""

import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.data.tokens import make_token_set
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.scores import FILE_NAME, Scores
from gptq_awq.evaluation.statistics import BLOCK

SCORES = Scores({"text/nll": np.arange(5.0), "text/nll/baseline": np.ones(5), "lm_eval/task/acc": np.zeros(0)})


def test_what_is_written_is_what_is_read(tmp_path):
    SCORES.write(tmp_path)
    read = Scores.read(tmp_path).arrays
    assert read.keys() == SCORES.arrays.keys()
    assert all(np.array_equal(read[name], SCORES.arrays[name]) for name in read)


def test_the_same_scores_give_the_same_bytes_whatever_their_order(tmp_path):
    first = SCORES.write(tmp_path).read_bytes()
    again = Scores(dict(reversed(SCORES.arrays.items()))).write(tmp_path).read_bytes()
    assert first == again


def test_a_write_that_fails_leaves_the_earlier_scores_and_no_litter(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    before = SCORES.write(tmp_path).read_bytes()
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        Scores({}).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_torn_file_is_a_value_error_and_no_file_an_os_error(tmp_path, keep):
    with pytest.raises(OSError, match="No such file"):
        Scores.read(tmp_path)
    path = SCORES.write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        Scores.read(tmp_path)


def test_sums_over_all_blocks_are_the_metrics():
    model = tiny_model("llama")
    tokens = make_token_set("text", tiny_tokens(8, 100), None, "random")
    baseline = full_precision(model, None, "weights", [tokens])
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.mul_(1.05)
    scored = score(model, None, baseline)
    arrays, metrics = scored.scores.arrays, scored.metrics
    count = arrays["text/tokens"].sum()
    assert count == 8 * 99
    assert len(arrays["text/tokens"]) == 8 * math.ceil(99 / BLOCK)
    for name, metric in {
        "nll": np.log(metrics["text/ppl@100"]),
        "nll/baseline": np.log(metrics["text/ppl@100/baseline"]),
        "kl": metrics["text/kl"],
        "agree": metrics["text/top1_agreement"],
    }.items():
        assert arrays[f"text/{name}"].sum() / count == pytest.approx(metric), name
        assert arrays[f"text/{name}"].dtype == np.float64
