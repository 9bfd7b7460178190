"""What a model writes for its own calibration: samples of its own predictions, from pieces of the given text on."""

import json

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from gptq_awq.api import load_method, quantize_model
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.calibration.self_calibration import SelfCalibration, _Drawn
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.runtime.memory import peak_bytes, reset_peak, resident_bytes

OWN = (
    "+method.self_calibration._target_=gptq_awq.calibration.self_calibration.SelfCalibration",
    "+method.self_calibration.windows=6",
    "+method.self_calibration.prompt=4",
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def given(rows: int = 4, length: int = 24):
    return make_token_set("given", tiny_tokens(rows, length), None, "memory")


def pieces(ids: torch.Tensor, length: int) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in ids.unfold(1, length, 1).flatten(0, 1)}


def test_words_are_drawn_from_the_softmax():
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0]), 20_000
    for temperature in (1.0, 0.5):
        drawn = _Drawn(temperature, 0, torch.device("cpu"), iter(()))(torch.empty(0), logits.expand(count, 4))
        found = drawn.argmax(1).bincount(minlength=4) / count
        expected = (logits / temperature).softmax(0)
        assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_given_text_comes_first_and_pieces_of_it_begin_what_is_written(model):
    tokens = given()
    found = SelfCalibration(windows=7, prompt=5, batch_size=3).extend(model, tokens, torch.float32)
    assert found.ids.shape == (11, 24)
    assert torch.equal(found.ids[:4], tokens.ids)
    assert pieces(found.ids[4:, :5], 5) <= pieces(tokens.ids, 5)
    assert found.name == "given+self"
    assert found.sha256 != tokens.sha256


def test_the_same_seed_writes_the_same_and_another_one_another(model):
    first, again, other = (SelfCalibration(4, 5, seed=seed).write(model, given(), torch.float32) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_warmth_the_model_writes_its_likeliest_words(model):
    written = SelfCalibration(windows=3, prompt=6, temperature=1e-4).write(model, given(), torch.float32)
    greedy = model.generate(
        written[:, :6],
        attention_mask=torch.ones(3, 6, dtype=torch.int64),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=18, min_new_tokens=18, pad_token_id=0),
    )
    assert torch.equal(written, greedy)


def test_windows_are_full_whatever_the_model_ends_with():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1.0  # the end of the text, wherever the last state's sum is positive
    assert SelfCalibration(windows=8, prompt=4).write(model, given(), torch.float32).shape == (8, 24)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_what_writing_keeps_is_counted(name):
    model = tiny_model(name)
    with torch.no_grad():
        kept = model(tiny_tokens(3, 24), use_cache=True).past_key_values
    bytes_ = sum(x.nbytes for layer in kept.layers for x in (layer.keys, layer.values))
    logits = 16 * 3 * model.config.vocab_size
    own = SelfCalibration(windows=5, batch_size=3)
    assert own.needed_bytes(model, 24, torch.float32) == bytes_ + logits
    copied = sum(p.numel() for p in model.parameters())
    assert own.needed_bytes(model, 24, torch.bfloat16) == bytes_ // 2 + 2 * copied + logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_allocated_than_is_counted(dtype):
    config = LlamaConfig(vocab_size=20_000, hidden_size=128, intermediate_size=128, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    own = SelfCalibration(windows=64, prompt=4, batch_size=64)
    own.write(model, given(length=6), dtype)  # compiles
    before, cpu = resident_bytes(), torch.device("cpu")
    reset_peak(cpu)
    own.write(model, given(), dtype)
    head = model.lm_head.weight.nbytes
    assert peak_bytes(cpu) - before < own.needed_bytes(model, 24, dtype) + 16 * head  # a copy of it per text is 64


def test_what_it_cannot_go_on_from_is_refused(model):
    with pytest.raises(UserError, match=r"SelfCalibration\.windows=0"):
        SelfCalibration(windows=0)
    with pytest.raises(UserError, match="temperature=0"):
        SelfCalibration(temperature=0)
    with pytest.raises(UserError, match=r"prompt=24: must be below data.seqlen=24"):
        SelfCalibration(prompt=24).check(model, given())
    padded = make_token_set("padded", tiny_tokens(2, 8), torch.ones(2, 8, dtype=torch.bool), "memory")
    with pytest.raises(UserError, match="packing=windows"):
        SelfCalibration(prompt=4).check(model, padded)


def test_a_model_in_memory_is_calibrated_on_both():
    from dataclasses import replace

    own, tokens = SelfCalibration(windows=6, prompt=4), given(4, 32)
    method = load_method("gptq")[0]
    options = {"group_size": 16, "settings": Settings(compute_dtype="float32")}
    found = quantize_model(tiny_model("llama"), tokens, replace(method, self_calibration=own), **options)
    both = own.extend(tiny_model("llama"), tokens, torch.float32)
    expected = quantize_model(tiny_model("llama"), both, method, **options)
    assert all(torch.equal(w.codes, expected.weights[name].codes) for name, w in found.weights.items())


def test_a_run_calibrates_on_what_its_model_wrote_and_replays(cli, tiny, tmp_path, cache):
    from gptq_awq.replay.replay import main

    plain = cli("method=gptq", "bits=3", *tiny, f"out={tmp_path / 'plain'}")
    done = cli("method=gptq", "bits=3", *tiny, *OWN, f"out={tmp_path / 'own'}")
    assert (plain.returncode, done.returncode) == (0, 0), done.stderr
    rows = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "own")]
    assert "write" in rows[1]["seconds"]
    hashes = [row["manifest"]["tokens"]["calibration"] for row in rows]
    assert hashes[0] != hashes[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQ_AWQ_CACHE", str(cache))
        assert main([str(tmp_path / "own"), "--scores"]) == 0


def test_a_streamed_model_is_refused_before_anything_is_computed(cli, tiny, tmp_path):
    done = cli("method=gptq", "stream=true", *tiny, *OWN, f"out={tmp_path / 'run'}")
    assert done.returncode != 0
    assert "method.self_calibration: writing takes the whole model" in done.stderr
