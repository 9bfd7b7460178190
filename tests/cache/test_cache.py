"""The cache: bounded, listed, cleared, and never the place where a result is lost."""

import os
import time

import pytest
import torch
from helpers.tiny_models import save_tiny_folder
from transformers import AutoTokenizer

from gptq_awq.cache import cache
from gptq_awq.data import tokens as data
from gptq_awq.data.text import make_text
from gptq_awq.errors import UserError
from gptq_awq.storage.checksummed import read


def put(folder, kind, name, size, age_days=0.0):
    path = folder / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    then = time.time() - age_days * cache.SECONDS_PER_DAY
    os.utime(path, (then, then))
    return path


def test_what_was_not_used_for_longest_goes_first_and_only_until_the_rest_fits(tmp_path):
    old, middle, new = (put(tmp_path, "moments", name, 100, age) for name, age in (("a/x", 3), ("b", 2), ("c", 1)))
    asset = put(tmp_path, "assets", "model.gguf", 10_000, 9)
    progress = put(tmp_path, "progress", "run/block", 10_000, 9)
    dropped = cache.prune(150, tmp_path)
    assert [entry.path.name for entry in dropped] == ["a", "b"]
    assert not old.exists()
    assert not middle.exists()
    assert all(path.exists() for path in (new, asset, progress))
    assert cache.prune(150, tmp_path) == []


def test_reading_an_entry_makes_it_recently_used(tmp_path):
    path = put(tmp_path, "baselines", "a", 10, age_days=5)
    read(path, "thing")  # damaged: nobody used it
    assert next(cache.entries(folder=tmp_path)).used < time.time() - 1000


def test_clear_takes_only_the_kinds_and_ages_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path))
    kept = [put(tmp_path, "assets", "a", 10), put(tmp_path, "moments", "new", 10)]
    put(tmp_path, "moments", "old", 1_000_000, age_days=8)
    assert cache.main(["clear", "moments", "--older", "7"]) == 0
    assert "deleted 1 entries, 1.0 MB" in capsys.readouterr().out
    assert all(path.exists() for path in kept)
    assert cache.main(["clear"]) == 0
    assert [path.exists() for path in kept] == [True, False]
    assert cache.main(["list"]) == 0
    assert "moments" in capsys.readouterr().out
    assert cache.main(["clear", "everything"]) == 2
    assert "assets" in capsys.readouterr().err


def test_an_unknown_kind_is_refused_before_anything_is_deleted(tmp_path):
    path = put(tmp_path, "moments", "a", 10)
    with pytest.raises(UserError, match="choose among"):
        cache.clear(["moments", "typo"], folder=tmp_path)
    assert path.exists()


def test_a_long_text_is_tokenized_once_and_another_tokenizer_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "LONG_TEXT", 100)
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_folder(tmp_path / "model"))
    text = make_text("text", ["the cat sees a dog. " * 50], "here")
    plain = data.evaluation_windows(text, tokenizer, 32)
    assert len(list((tmp_path / "cache" / "tokens").glob("*.safetensors"))) == 1
    with monkeypatch.context() as forbidden:
        forbidden.setattr(data, "_encode", None)
        assert torch.equal(data.evaluation_windows(text, tokenizer, 32).ids, plain.ids)
    tokenizer.add_tokens(["cat"])
    assert data.evaluation_windows(text, tokenizer, 32).ids.numel() < plain.ids.numel()
