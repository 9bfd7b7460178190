"""The library goes the whole way: texts to codes, a checkpoint and back, options by name, a comparison and a report."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_awq import load_quantized, quantize_model
from gptq_awq.api import load_method
from gptq_awq.errors import UserError

SMALL = {"bits": 4, "group_size": 16, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def texts(tiny_text):
    return tiny_text.read_text().splitlines()[:40]


@pytest.fixture(scope="module")
def quantized(model, tokenizer, texts):
    return quantize_model(copy.deepcopy(model), texts, "gptq", tokenizer=tokenizer, sym=True, **SMALL)


def test_texts_are_the_windows_that_the_tokenizer_makes_of_them(model, tokenizer, texts, quantized):
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    assert torch.equal(quantized.calibration.ids, ids)
    by_ids = quantize_model(copy.deepcopy(model), ids, "gptq", sym=True, **SMALL)
    assert all(torch.equal(by_ids.weights[name].codes, w.codes) for name, w in quantized.weights.items())


@pytest.mark.parametrize("form", ["gptq", "hf", "compressed_tensors"])
def test_a_saved_model_is_loaded_with_the_very_weights(quantized, tmp_path, form):
    folder = quantized.save(tmp_path / "saved", format=form, **({"dtype": "float32"} if form == "hf" else {}))
    assert folder == tmp_path / "saved"
    loaded = load_quantized(folder)
    for name in quantized.weights:
        ours, theirs = (each.get_submodule(name).weight for each in (quantized.model, loaded))
        assert torch.allclose(ours, theirs, rtol=0, atol=0), name
    ids = (
        quantized.calibration.ids[:1] if quantized.calibration else tokenizer("the cat", return_tensors="pt").input_ids
    )
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, quantized.model(ids).logits, atol=2e-2)
    quantized.save(folder, format=form)  # an earlier checkpoint is replaced


def test_saving_refuses_what_it_would_lose(quantized, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for arguments, told in (
        ({"folder": tmp_path / "mine"}, "something else"),
        ({"folder": tmp_path / "new", "format": "gpqt"}, "did you mean gptq"),
        ({"folder": tmp_path / "new", "format": "gguf"}, "gguf"),
        ({"folder": tmp_path / "new", "dtype": "float64"}, "dtype"),
    ):
        with pytest.raises(UserError, match=told):
            quantized.save(**arguments)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert not (tmp_path / "new").exists()


def test_options_go_by_their_names():
    method, grid = load_method("gptq", 3, 32, options={"damping": 0.2, "act_order": False, "search": "mse"})
    assert (method.solver.damping, method.solver.act_order, grid.search) == (0.2, False, "mse")
    assert (grid.bits, grid.group_size) == (3, 32)
    assert load_method("rtn", grid="q4_k_m")[1].label == "q4_k_m"
    assert load_method("gptq", options={"method.solver.damping": 0.3})[0].solver.damping == 0.3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dampign": 0.1}, "did you mean damping"),
        ({"damping": "much"}, "method.solver.damping=much"),
        ({"damping": -1}, "method.solver.damping"),
    ],
)
def test_a_mistaken_option_is_named(options, told):
    with pytest.raises(UserError, match=told):
        load_method("gptq", options=options)


def test_a_mistaken_method_grid_or_input_is_named(model, tokenizer):
    for call, told in (
        (lambda: load_method("gpqt"), "did you mean method=gptq"),
        (lambda: load_method("gptq", grid="q4_km"), "did you mean grid=q4_k_m"),
        (lambda: load_method("gptq", grid="mixed"), "allocated"),
        (lambda: quantize_model(model, ["some text"], "gptq"), "tokenizer"),
        (lambda: quantize_model(model, [], "gptq", tokenizer=tokenizer), "list of texts"),
        (lambda: quantize_model(model, torch.zeros(3), "gptq"), "token ids"),
        (lambda: quantize_model(model, None, load_method("rtn")[0], damping=1), "Method object"),
    ):
        with pytest.raises(UserError, match=told):
            call()


def test_a_comparison_is_what_both_models_losses_give(quantized, model, texts):
    found = quantized.compare(model, texts, prompts=["the cat"], seqlen=32, tokens=8)
    ids = quantized.calibration.ids
    losses = []
    for each in (model, quantized.model):
        with torch.no_grad():
            logits = each(ids).logits[:, :-1].flatten(0, 1)
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp()))
    name = next(key for key in found.metrics if "ppl" in key and key.count("/") == 1)
    assert [found.metrics[f"{name}/baseline"], found.metrics[name]] == pytest.approx(losses, rel=1e-4)
    assert len(found.samples) == 1
    assert "| full precision | quantized |" in str(found)
    with pytest.raises(UserError, match="itself"):
        quantized.compare(quantized.model)


def test_a_report_and_a_repr_say_what_was_done(quantized):
    assert repr(quantized).startswith("QuantizedModel(LlamaForCausalLM, gptq, 14 linears, ")
    report = quantized.report()
    assert report.linears == 14
    assert report.worst[0][1] == max(row["error_after"] for row in quantized.ledger)
    assert f"{report.bits_per_weight:.3f}" in str(report)
