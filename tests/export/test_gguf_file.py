"""GGUF files: llama.cpp's converter writes them, codes go where it puts weights, readers find the same model."""

import json
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as T  # noqa: N812
from helpers.architectures import tiny_architecture
from helpers.gguf_models import GEMMA, VARIANTS, block_types_in, bpe, built, exported, fields
from helpers.quantized_weights import assert_decodes, rounded_source
from helpers.tiny_models import GROUPED, MIXTURES, tiny_model, tiny_tokens

from gptq_awq.errors import UserError
from gptq_awq.export import gguf_converter, gguf_layout
from gptq_awq.export.base import LinearSpec, Source
from gptq_awq.export.config import write_config
from gptq_awq.export.engines import answer, compare, find
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gguf_converter import LayerKind, imported, known_architectures
from gptq_awq.export.gguf_file import read_gguf
from gptq_awq.export.gguf_layout import observe, skeleton
from gptq_awq.export.layout import LAYOUT, Layout
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import Probe, verify
from gptq_awq.export.write import Exports
from gptq_awq.grids.mix import llama_grid
from gptq_awq.models.unfuse import unfuse
from gptq_awq.runtime.progress import no_track

pytestmark = pytest.mark.usefixtures("converter")
Q8 = llama_grid("q8_0")
WIDE = GROUPED | {"intermediate_size": 96, "num_experts_per_tok": 2}
"""Widths that blocks of 32 divide, experts' too."""


def matrices(model):
    """Parameters by name, matrices as (out, in), which a file should give back."""
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        yield name, (parameter.T if type(module).__name__ == "Conv1D" and parameter.dim() == 2 else parameter).numpy()


PLAIN = [variant for variant in VARIANTS if variant != "gemma3"]
"""gemma3's converter counts the tokens of a tokenizer."""


@pytest.mark.parametrize("variant", PLAIN)
def test_reading_a_file_gives_back_every_parameter(variant, tmp_path):
    model = built(variant)
    path = exported(tmp_path, model, plain_dtype="F32")
    read = {tensor.name: tensor.weight for tensor in read_gguf(path, Layout.read(tmp_path))}
    wanted = dict(matrices(model))
    assert read.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(read[name], weight)


def test_transformers_reads_the_same_model(tmp_path):
    tokenizer = bpe(["bytes of words"], pad_token="<|end|>")
    model = built("llama", len(tokenizer))
    exported(tmp_path, model, tokenizer, plain_dtype="F32", pre="gpt-2")
    read = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    theirs = dict(read.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=2e-7 if "norm" in name else 0)


@pytest.mark.parametrize("variant", ["llama", "qwen3-wide", "gpt2", "gpt-neox", "mixtral", "gpt-oss"])
def test_codes_follow_weights_wherever_the_converter_puts_them(variant, tmp_path):
    model = mixture(variant) if variant in MIXTURES else built(variant)
    assert_decodes(GGUFFormat(), replace(rounded_source(model, Q8), tokenizer=None), tmp_path)


def mixture(name):
    """A tiny mixture whose experts are linears, in widths that blocks divide."""
    if name == "gpt-oss":
        model = T.AutoModelForCausalLM.from_config(T.GptOssConfig(**WIDE, head_dim=16, num_local_experts=4))
        model.eval().requires_grad_(False)
    else:
        model = tiny_model(name)
    unfuse(model)
    return model


def test_experts_of_one_tensor_want_one_grid(tmp_path):
    source = rounded_source(mixture("mixtral"), Q8)
    name = "model.layers.0.mlp.experts.down_proj.1"
    linears = [
        LinearSpec(n, *w.codes.shape, llama_grid("q4_0") if n == name else w.grid) for n, w in source.weights.items()
    ]
    with pytest.raises(UserError, match=r"llama.cpp has one type for .*down_proj\.\d\.weight \(Q8_0\)"):
        GGUFFormat().check_model(linears, source.model, None)


def test_weights_whose_codes_cannot_follow_are_stored_exactly_and_said(tmp_path):
    # llama.cpp keeps half of DeepSeek's kv_b_proj transposed.
    model = tiny_model("deepseek-v3")
    unfuse(model)
    name = "model.layers.0.self_attn.kv_b_proj"
    source = rounded_source(model, Q8)
    source = Source(model, None, "tiny", {name: source.weights[name]})
    (note,) = GGUFFormat().check_model([LinearSpec(name, *source.weights[name].codes.shape, Q8)], model, None)
    assert "blk.0.attn_k_b.weight" in note
    assert "float32" in note
    GGUFFormat().write(source, tmp_path)
    (decoded,) = GGUFFormat().decode(tmp_path)
    assert decoded.name == name
    assert torch.equal(decoded.weight, source.weights[name].dequantize())


@pytest.mark.parametrize("further", [{"attention_factor": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {}], ids=str)
def test_llama_cpp_scales_attention_as_yarns_options_say(further, tmp_path):
    pytest.importorskip("xllamacpp")
    config = VARIANTS["qwen2-yarn"]()
    config.rope_parameters = config.rope_parameters | further
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    path = exported(tmp_path, model, plain_dtype="F32")
    tokens = tiny_tokens(1, 24)
    theirs = answer("xllamacpp", path, tokens, "gguf", vocab=config.vocab_size).logits
    assert compare(model(tokens).logits, theirs, tokens).max_kl < 1e-6
    assert ("qwen2.rope.scaling.attn_factor" in fields(path)) == bool(further)


@pytest.mark.parametrize("plain", ["F16", "BF16"])
def test_matrices_are_rounded_once_and_vectors_never(plain, tmp_path):
    model = built("llama")
    path = exported(tmp_path, model, plain_dtype=plain)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[plain]
    layout = Layout.read(tmp_path)
    types = block_types_in(path, layout)
    for tensor in read_gguf(path, layout):
        weight = model.state_dict()[tensor.name]
        assert types[tensor.name] == ("F32" if weight.dim() == 1 else plain)
        np.testing.assert_array_equal(tensor.weight, weight.to(torch.float32 if weight.dim() == 1 else dtype).float())


def test_a_file_describes_itself(tmp_path):
    source = rounded_source(built("llama-biased"), Q8)
    found = fields(exported(tmp_path, source.model, weights=source.weights))
    wanted = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 7,
        "llama.context_length": 128,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 64,
    }
    assert {key: found.get(key) for key in wanted} == wanted


def test_where_llama_cpp_ignores_windows_the_context_is_one_window(tmp_path, caplog):
    model = T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=32)).requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        path = exported(tmp_path, model)
    assert fields(path)["llama.context_length"] == 32
    assert "sliding windows" in caplog.text


def test_what_the_converter_does_not_know_is_refused_before_anything_is_calibrated():
    model = tiny_model("opt")
    with pytest.raises(UserError, match="converter does not know OPTForCausalLM"):
        GGUFFormat().check_model([], model, None)


def test_classes_that_the_converter_spells_otherwise_are_known_to_it(converter):
    for name in ("PhimoeForCausalLM", "MptForCausalLM", "LlamaForCausalLM"):
        assert name.lower() in known_architectures(converter)


def test_parts_of_a_config_keep_the_names_that_the_converter_looks_for(converter, tmp_path):
    model = tiny_architecture("step3p7")
    write_config(model, tmp_path, torch.float32, None)
    with imported(converter):
        found = gguf_converter._options(tmp_path, sys.modules["conversion.base"], model.config)
    assert found["text_config"]["num_attention_groups"] == model.config.text_config.num_key_value_heads


def test_what_a_converter_insists_on_is_found_among_the_options_of_full_attention(converter, tmp_path):
    model = tiny_architecture("mimo_v2_flash")
    write_config(model, tmp_path, torch.float32, None)
    with imported(converter):
        found = gguf_converter._options(tmp_path, sys.modules["conversion.base"], model.config)
    assert found["rope_parameters"]["partial_rotary_factor"] == pytest.approx(0.334)
    with pytest.raises(KeyError):
        found["rope_parameters"]["mrope_section"]


def test_a_kind_of_layer_equals_its_earlier_name_and_no_other():
    assert [LayerKind(kind) == "attention" for kind in ("full_attention", "attention", "linear_attention")] == [1, 1, 0]
    assert LayerKind("linear_attention") == "mamba" != LayerKind("full_attention")
    assert LayerKind("linear_attention") in {"linear_attention", "moe"}


@pytest.mark.parametrize(
    "name", ["mpt", "phi", "falcon", "gemma3_text", "gemma4_text", "granitemoehybrid", "afmoe", "laguna"]
)
def test_llama_cpp_computes_what_a_model_of_published_proportions_does(name, llama_cpp, tmp_path):
    model, ids = tiny_architecture(name), tiny_tokens(1, 40)
    with torch.no_grad():
        ours = model(ids, use_cache=False).logits
    found = compare(ours, llama_cpp(exported(tmp_path, model, plain_dtype="F32"), ids)[..., : ours.shape[-1]], ids)
    assert found.mean_kl < 1e-5  # it looks gelu up in a table of float16


def test_a_value_that_the_dtype_does_not_hold_is_refused(tmp_path):
    large = built("llama")
    large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"F16 cannot hold blk\.0\.ffn_up\.weight"):
        exported(tmp_path, large)


def test_a_folder_that_is_no_checkout_is_named():
    with pytest.raises(UserError, match=r"export\.gguf\.converter=/nowhere: there is no conversion/ folder"):
        GGUFFormat(converter="/nowhere").check_model([], tiny_model("llama"), None)


def test_a_layout_that_is_of_another_file_is_one_line(tmp_path):
    path = exported(tmp_path, built("llama"))
    layout = Layout.read(tmp_path)
    runs = dict(layout.runs) | {"output_norm.weight": layout.runs["output.weight"]}
    with pytest.raises(UserError, match="not what its layout says"):
        list(read_gguf(path, Layout(layout.numbering, runs)))


def test_a_checkpoint_is_verified_and_rebuilt_without_the_converter(tmp_path, monkeypatch):
    monkeypatch.setitem(GEMMA, "tie_word_embeddings", True)
    source = rounded_source(built("gemma2"), Q8)  # its norms are stored + 1
    tokens = tiny_tokens(2, 16)
    exports = Exports((GGUFFormat(plain_dtype="F32"),))
    source = Source(source.model, None, "tiny", source.weights)
    (done,) = exports.write(source, tmp_path, Probe.of(source.model, tokens, "x"), {}, no_track)
    monkeypatch.setattr("gptq_awq.export.gguf.converter_root", lambda _: pytest.fail("asked for the converter"))
    assert verify(done.path).weights == len(source.weights)
    with torch.no_grad():
        torch.testing.assert_close(reference_model(done.path)(tokens).logits, source.model(tokens).logits)
    assert LAYOUT in json.loads((done.path / "verification.json").read_text())["files"]


# llama.cpp, where it is installed.


@pytest.fixture(scope="module")
def llama_cpp():
    if find("xllamacpp", "gguf") is None:
        pytest.skip("engine xllamacpp is not installed (scripts/install_engine.py xllamacpp)")
    return lambda path, ids: answer("xllamacpp", path, ids, "gguf").logits


@pytest.mark.parametrize("variant", PLAIN)
def test_llama_cpp_computes_the_same_distributions(variant, llama_cpp, tmp_path):
    model, ids = built(variant), tiny_tokens(1, 48)
    with torch.no_grad():
        ours = model(ids).logits
    found = compare(ours, llama_cpp(exported(tmp_path, model, plain_dtype="F32"), ids), ids)
    assert found.max_kl < 1e-6  # it looks gelu up in a table of float16


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_llama_cpp_routes_as_the_mixture_in_memory_does(name, llama_cpp, tmp_path):
    model, ids = mixture(name), tiny_tokens(1, 24)
    with torch.no_grad():
        ours = model(ids).logits
    found = compare(ours, llama_cpp(exported(tmp_path, model, plain_dtype="F32"), ids), ids)
    assert found.max_kl < 1e-6


def test_llama_cpp_computes_what_the_rounded_model_does(llama_cpp, tmp_path):
    source, ids = rounded_source(built("llama"), Q8), tiny_tokens(1, 24)
    path = exported(tmp_path, source.model, weights=source.weights, plain_dtype="F32")
    with torch.no_grad():
        ours = source.model(ids).logits
    assert compare(ours, llama_cpp(path, ids), ids).mean_kl < 3e-3  # its kernels round activations to 8 bits


def test_where_tensors_go_is_observed_once_for_a_config(converter, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    model, seen = built("llama"), []
    observed = gguf_layout._observed
    monkeypatch.setattr(gguf_layout, "_observed", lambda *given: seen.append(1) or observed(*given))
    with skeleton(model, None) as folder:
        first, second = observe(converter, folder, model), observe(converter, folder, model)
    assert len(seen) == 1
    assert first.runs.keys() == second.runs.keys()
    assert all(np.array_equal(first.runs[name].starts, second.runs[name].starts) for name in first.runs)
    with skeleton(other := built("gemma3"), None) as folder:
        observe(converter, folder, other)
    assert len(seen) == 2
