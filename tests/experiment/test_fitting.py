"""Rows of tokens fit the model's context and embedding, or the option is named before anything slow."""

import json

import pytest
import torch
from helpers.tiny_models import save_tiny_folder, tiny_model
from safetensors.torch import load_file, save_file

from gptq_awq.data.corpora import LocalText
from gptq_awq.errors import UserError
from gptq_awq.experiment import fitting
from gptq_awq.experiment.fitting import fitted_corpus
from gptq_awq.models.load import LoadedModel, LocalModel

LEARNED, ROTARY = ["gpt2", "opt"], ["llama", "gemma3", "gpt-neox", "phi3", "mixtral"]


def loaded(name: str) -> LoadedModel:
    """A random model with a context of 128 tokens."""
    return LoadedModel(tiny_model(name), None, name, "memory", "sha")


@pytest.mark.parametrize("name", LEARNED + ROTARY)
def test_the_default_length_follows_a_smaller_context(name):
    corpus, model = fitted_corpus(LocalText(), loaded(name))
    assert corpus.seqlen == 128
    assert "128" in model.report.notes[0]


@pytest.mark.parametrize("length", [1, 127, 128])
def test_a_length_within_the_context_stays(length):
    model = loaded("llama")
    assert fitted_corpus(LocalText(seqlen=length), model) == (LocalText(seqlen=length), model)


@pytest.mark.parametrize("name", LEARNED)
def test_a_length_beyond_learned_positions_is_refused(name):
    with pytest.raises(UserError, match=r"^data\.seqlen=129 is longer than the model's context of 128 tokens"):
        fitted_corpus(LocalText(seqlen=129), loaded(name))


@pytest.mark.parametrize("name", ROTARY)
def test_a_length_beyond_a_rotary_context_is_kept_and_said(name, caplog):
    corpus, model = fitted_corpus(LocalText(seqlen=129), loaded(name))
    assert corpus.seqlen == 129
    [note] = model.report.notes
    assert note in caplog.text
    assert "context of 128" in note
    assert model.model(torch.ones(1, 129, dtype=torch.long)).logits.isfinite().all()


def test_the_default_length_is_refused_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(fitting, "_was_given", lambda: True)
    with pytest.raises(UserError, match=r"^data\.seqlen=512"):
        fitted_corpus(LocalText(), loaded("gpt2"))


def test_a_model_without_a_context_takes_any_length(monkeypatch):
    model = loaded("llama")
    monkeypatch.setattr(fitting, "context_length", lambda _model: None)
    assert fitted_corpus(LocalText(seqlen=10**6), model)[0].seqlen == 10**6


# ------------------------------------------------------------------------------------------------- on a command line


def arguments(folder, text):
    return ["method=gptq", "group_size=32", "model=local", f"model.path={folder}", "data=local", f"data.path={text}"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "gpt2",
            ["data.seqlen=512", "data.samples=4", "eval=none"],
            "data.seqlen=512 is longer than the model's context",
        ),
        (
            "llama",
            ["data.seqlen=64", "data.samples=4", "eval.perplexity.seqlen=256"],
            "eval.perplexity.seqlen=256 is long",
        ),
    ],
)
def test_rows_beyond_the_context_end_a_run_before_it_begins(name, more, message, cli, tiny_text, tmp_path):
    folder = save_tiny_folder(tmp_path / "model", name)
    more = [*more, f"eval.perplexity.path={tiny_text}"] if "eval=none" not in more else more
    done = cli(*arguments(folder, tiny_text), *more, f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_token_beyond_the_embedding_ends_a_run_before_it_begins(cli, tiny_text, tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    tokenizer = LocalModel(path=str(folder)).load("float32", "cpu").tokenizer
    tokenizer.add_tokens([*(f"[{i}]" for i in range(10)), "house"])
    tokenizer.save_pretrained(folder)
    done = cli(
        *arguments(folder, tiny_text), "data.samples=4", "data.seqlen=64", "eval=none", f"out={tmp_path / 'out'}"
    )
    assert done.returncode == 2
    assert "data: the token 'house' (" in done.stderr
    assert "is none of the model's 64" in done.stderr


def test_padding_beyond_the_embedding_changes_no_codes(tiny_text, tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    model = LocalModel(path=str(folder)).load("float32", "cpu")
    corpus = LocalText(path=str(tiny_text), samples=1, seqlen=100_000, packing="documents")
    expected = fitting.readable(corpus.tokens(model.tokenizer, 0), model, "data")
    model.tokenizer.add_tokens([f"[{i}]" for i in range(10)])
    model.tokenizer.pad_token = "[9]"
    padded = corpus.tokens(model.tokenizer, 0)
    assert int(padded.ids.max()) >= 64
    fitted = fitting.readable(padded, model, "data")
    assert int(fitted.ids.max()) < 64
    assert expected.mask is not None
    assert torch.equal(fitted.ids[expected.mask], expected.ids[expected.mask])


@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_loading_finds_is_in_log_manifest_and_checkpoint(stream, cli, tiny_text, tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous(),
        "extra.bias": torch.ones(3),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    exports = ["export.formats=[hf,gptq]", "export.hf.dtype=float32", f"stream={stream}", "eval=none", f"out={out}"]
    done = cli(*arguments(folder, tiny_text), "data.samples=4", *exports)
    assert done.returncode == 0, done.stderr
    row = json.loads((out / "results.json").read_text())
    loading = row["manifest"]["loading"]
    assert loading["unplaced"] == ["extra.bias"]
    assert loading["untied"] == "lm_head.weight"
    assert loading["context"] == 128
    assert loading["notes"] == ["data.seqlen=128, the model's context, which is shorter than the default of 512"]
    log = (out / "run.log").read_text()
    assert "extra.bias" in log
    assert "loaded untied" in log
    for name in ("hf", "gptq"):
        written = json.loads((out / "checkpoints" / name / "config.json").read_text())
        assert written["tie_word_embeddings"] is False
        head = load_file(out / "checkpoints" / name / "model.safetensors")["lm_head.weight"]
        assert torch.equal(head.float(), tensors["lm_head.weight"].to(head.dtype).float())
