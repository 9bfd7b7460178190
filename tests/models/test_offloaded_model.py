"""A model that stays on disk gives what one in memory gives, to the bit; and nothing of it is in memory for long."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from gguf import GGUFReader
from helpers.gguf_models import bpe, built
from helpers.tiny_models import CONFIGS, save_tiny_folder, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_awq.api import load_method
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.evaluation.head import Head
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models import offloaded_model as module
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.load import load_folder
from gptq_awq.models.offload import offloaded, residence, resident
from gptq_awq.models.offloaded_model import open_offloaded
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.journal import Journal

GRID = IntGrid(4, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_counts_as_large(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 100)


@pytest.fixture
def folder(tmp_path):
    def saved(name: str):
        tiny_model(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def opened(folder, dtype=torch.float32):
    return open_offloaded(folder, AutoConfig.from_pretrained(folder), dtype, CPU, "model.path=x")


def whole(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def calibration(rows=8):
    return make_token_set("calibration", tiny_tokens(rows, 16), None, "memory")


def absent(model):
    """Names of large parameters that are not in memory."""
    return [n for n, p in model.named_parameters() if p.untyped_storage().nbytes() < p.numel() * p.element_size()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_models_logits_are_the_whole_models(name, dtype, folder):
    path = folder(name)
    model, expected = opened(path, dtype), whole(path, dtype)
    assert torch.equal(model(tiny_tokens()).logits, expected(tiny_tokens()).logits)
    for (own, p), (other, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (own, p.shape, p.dtype) == (other, q.shape, q.dtype)


def test_between_calls_no_block_is_in_memory(folder):
    model = opened(folder("llama"))
    model(tiny_tokens())
    prefix, blocks = find_blocks(model)
    assert set(absent(model)) >= {f"{prefix}.{n}" for n, _ in blocks.named_parameters()}
    with resident(blocks[1]):
        assert not blocks[1].self_attn.q_proj.weight.isnan().any()
        assert blocks[0].self_attn.q_proj.weight.isnan().all()
    assert blocks[1].self_attn.q_proj.weight.isnan().all()


def test_a_copy_of_a_resident_block_stays(folder):
    model = opened(folder("llama"))
    block = find_blocks(model)[1][0]
    with resident(block):
        kept = copy.deepcopy(block)
    assert residence(kept) is None
    assert not kept.mlp.up_proj.weight.isnan().any()
    assert block.mlp.up_proj.weight.isnan().all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt-post-norm", "phi3"])
@pytest.mark.parametrize("preset", ["rtn", "gptq", "awq", "gptaq", "awq_gptq"])
def test_streamed_codes_are_the_whole_models(name, preset, folder, tmp_path):
    path, (method, _) = folder(name), load_method(preset)
    model, expected = opened(path), whole(path)
    ours = weights(quantize(model, calibration(), method, GRID, progress=journal(tmp_path)))
    theirs = weights(quantize(expected, calibration(), method, GRID))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k].codes, theirs[k].codes) for k in ours)
    assert torch.equal(model(tiny_tokens()).logits, expected(tiny_tokens()).logits)
    assert set(absent(model)) >= {f"{k}.weight" for k in ours}


def weights(steps):
    return {name: weight for block in steps for name, weight in block.weights.items()}


def journal(tmp_path):
    return Journal(tmp_path / "journal", "key")


def test_embedding_and_head_on_a_grid_are_streamed_too(folder, tmp_path):
    path, (method, _) = folder("gpt2"), load_method("rtn")
    model, expected = opened(path), whole(path)
    ours = [(b.index, list(b.weights)) for b in quantize(model, None, method, Everything(), progress=journal(tmp_path))]
    assert ours == [(b.index, list(b.weights)) for b in quantize(expected, None, method, Everything())]
    assert ours[0][0] == -1
    assert torch.equal(model(tiny_tokens()).logits, expected(tiny_tokens()).logits)


@dataclass(frozen=True)
class Everything:
    """Four bits for each weight, those outside of the blocks too."""

    needs_hessian = False

    def at(self, _place: Place) -> Grid:
        return GRID


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "gpt2"])
def test_scores_block_by_block_are_those_window_by_window(name, compute_dtype, folder):
    path, tokens = folder(name), make_token_set("text", tiny_tokens(4, 64), None, "memory")
    model, expected = opened(path), whole(path)
    ours, theirs = (full_precision(m, None, "x", [tokens], compute_dtype=compute_dtype) for m in (model, expected))
    assert torch.equal(ours.scores[0].nll, theirs.scores[0].nll)
    assert ours.scores[0].head_sha256 == theirs.scores[0].head_sha256
    assert score(model, None, ours).metrics == score(expected, None, theirs).metrics
    assert Head.of(model).divisible == Head.of(expected).divisible


def test_spilled_streams_give_the_same_codes(folder, tmp_path):
    path, (method, _) = folder("llama"), load_method("gptaq")
    settings = Settings(tokens_per_batch=32, memory_budget=1, scratch=tmp_path / "spilled")
    model, expected = whole(path), whole(path)
    ours = [b.weights for b in quantize(model, calibration(), method, GRID, settings)]
    theirs = [b.weights for b in quantize(expected, calibration(), method, GRID, Settings(tokens_per_batch=32))]
    assert len(list((tmp_path / "spilled").iterdir())) == 2 * 4  # hidden states, and full precision's, of four batches
    for block, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(block[k].codes, other[k].codes) for k in block)


def test_a_killed_streamed_run_goes_on(folder, tmp_path):
    path, (method, _) = folder("llama"), load_method("gptq")
    whole_run = [b.weights for b in quantize(whole(path), calibration(), method, GRID)]
    steps = quantize(opened(path), calibration(), method, GRID, progress=journal(tmp_path))
    next(steps)
    steps.close()
    model = opened(path)
    restored = []
    again = quantize(model, calibration(), method, GRID, progress=journal(tmp_path))
    for block, other in zip(again, whole_run, strict=True):
        assert all(torch.equal(block.weights[k].codes, other[k].codes) for k in other)
        restored.append(block.restored)
    assert restored == [True, False]
    assert set(absent(model)) >= {f"{k}.weight" for b in whole_run for k in b}


def test_a_record_is_made_block_by_block(folder, tmp_path):
    path, (method, _) = folder("llama"), load_method("awq")
    model, expected = opened(path), whole(path)
    record = ObservationCache(Journal(tmp_path / "record", "key"), 10**9)
    steps = quantize(model, calibration(), method, GRID, record=record, progress=journal(tmp_path))
    ours = [dict(block.weights) for block in steps]
    theirs = [b.weights for b in quantize(expected, calibration(), method, GRID)]
    for block, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(block[k].codes, other[k].codes) for k in other)


@pytest.mark.parametrize("preset", ["quarot", "gptq_distill"])
def test_what_works_on_the_whole_model_is_refused(preset, folder, tmp_path):
    method, _ = load_method(preset)
    with pytest.raises(UserError, match="memory_budget"):
        list(quantize(opened(folder("llama")), calibration(), method, GRID, progress=journal(tmp_path)))


def test_shards_are_read_through_their_index(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(opened(tmp_path / "sharded")(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(folder):
    path = folder("llama")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.path=x: holds no weights for model.layers.1.mlp.up_proj.weight"):
        opened(path)


def test_ties_that_the_files_contradict_are_loosened(folder):
    path = folder("llama")
    expected = whole(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(opened(path)(tiny_tokens()).logits, expected(tiny_tokens()).logits)


def test_a_model_is_streamed_where_it_has_no_room(tmp_path):
    path = save_tiny_folder(tmp_path / "model")
    size = 4 * sum(p.numel() for p in whole(path).parameters())
    assert offloaded(load_folder(path, "float32", "cpu", "model.path=x", room=size - 1)[0])
    assert not offloaded(load_folder(path, "float32", "cpu", "model.path=x", room=size)[0])
    assert not offloaded(load_folder(path, "bfloat16", "cpu", "model.path=x", room=size - 1)[0])


def test_pickled_weights_cannot_be_streamed(tmp_path):
    path = save_tiny_folder(tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        opened(path)
    assert not offloaded(load_folder(path, "float32", "cpu", "model.path=x", room=0)[0])


def test_streaming_changes_no_number_of_a_run(cli, tiny_folder, tiny_text, tmp_path):
    shared = ["method=gptq", "group_size=32", "model=local", f"model.path={tiny_folder}", "data=local"]
    shared += [f"data.path={tiny_text}", "data.samples=8", "data.seqlen=32", f"eval.perplexity.path={tiny_text}"]
    shared += ["eval.perplexity.seqlen=64", "eval.perplexity.windows=4", "resume=false"]
    rows = []
    for stream in ("false", "true"):
        done = cli(*shared, f"stream={stream}", f"out={tmp_path / stream}", GPTQ_AWQ_CACHE=str(tmp_path / f"c{stream}"))
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((tmp_path / stream / "results.json").read_text()))
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert rows[0]["size_bytes"] == rows[1]["size_bytes"]
    assert not list((tmp_path / "ctrue" / "progress").glob("[!.]*"))


@pytest.mark.parametrize("budget", ["12 parsecs", "100MB", "-3"])
def test_a_budget_that_cannot_be_is_refused(budget, cli):
    done = cli(f"memory_budget={budget}")
    assert done.returncode != 0
    assert "memory_budget=" in done.stderr


@pytest.mark.parametrize(
    ("formats", "grid"),
    [
        ("gptq,awq,compressed_tensors,mlx,hf", ["group_size=32"]),
        ("bnb", ["grid=nf4", "group_size=32"]),
    ],
)
def test_checkpoints_of_a_streamed_model_are_the_whole_models(formats, grid, cli, tiny_folder, tiny_text, tmp_path):
    shared = ["method=rtn", *grid, "model=local", f"model.path={tiny_folder}", "eval=none"]
    shared += [f"export.formats=[{formats}]"]
    for stream in ("false", "true"):
        done = cli(*shared, f"stream={stream}", f"out={tmp_path / stream}", GPTQ_AWQ_CACHE=str(tmp_path / f"c{stream}"))
        assert done.returncode == 0, done.stderr
    for name in formats.split(","):
        ours, theirs = (hashes(tmp_path / stream / "checkpoints" / name) for stream in ("true", "false"))
        assert ours == theirs


def test_a_gguf_file_of_a_streamed_model_is_the_whole_models(cli, tmp_path):
    tokenizer, folder = bpe(["bytes of words"]), tmp_path / "model"
    built("llama-256", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shared = ["method=rtn", "grid=q4_k_m", "model=local", f"model.path={folder}", "eval=none"]
    shared += ["export.formats=[gguf]", "export.gguf.other_ids=allow"]
    for stream in ("false", "true"):
        done = cli(*shared, f"stream={stream}", f"out={tmp_path / stream}", GPTQ_AWQ_CACHE=str(tmp_path / f"c{stream}"))
        assert done.returncode == 0, done.stderr
    ours, theirs = (tmp_path / stream / "checkpoints" / "gguf" for stream in ("true", "false"))
    assert hashes(ours)[1] == hashes(theirs)[1]
    first, second = (
        {t.name: (t.tensor_type, t.data) for t in GGUFReader(f / "model.gguf").tensors} for f in (ours, theirs)
    )
    assert first.keys() == second.keys()  # the order in the file is that in which weights come from disk
    for name, (kind, data) in first.items():
        assert kind == second[name][0]
        assert (data == second[name][1]).all()


def hashes(folder):
    """Of a checkpoint's files, and of the weights in it."""
    record = json.loads((folder / "verification.json").read_text())
    return record["files"], record["weights"]


def test_a_forecast_is_printed_where_it_is_asked_for(cli, tiny_folder, tiny_text, tmp_path):
    shared = ["method=gptq", "group_size=32", "model=local", f"model.path={tiny_folder}", "data=local", "eval=none"]
    shared += [f"data.path={tiny_text}", "data.samples=8", "data.seqlen=32", "forecast=true", f"out={tmp_path / 'out'}"]
    done = cli(*shared)
    assert done.returncode == 0, done.stderr
    assert "quantize: solving" in done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"]["forecast"] > 0
