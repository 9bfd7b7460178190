"""GGUF files: tensors in llama.cpp's terms, hyperparameters, tokenizers; read back by transformers and llama.cpp."""

import logging

import numpy as np
import pytest
import torch
import transformers as T  # noqa: N812
from gguf import MODEL_ARCH, get_tensor_name_map
from helpers.gguf_models import FIELDS, GEMMA, LLAMA3, VARIANTS, YARN, bpe, built, fields
from helpers.tiny_models import CONFIGS, GROUPED

from gptq_awq.errors import UserError
from gptq_awq.export.gguf_architecture import ARCHITECTURES, rope_factors
from gptq_awq.export.gguf_blocks import pack, unpack_codes
from gptq_awq.export.gguf_file import check_architecture, read_gguf, rows, write_gguf


def weights(model):
    """Module → matrix (out, in) or vector, biases by their own names; what read_gguf should say."""
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_conv1d = type(module).__name__ == "Conv1D" and parameter.dim() == 2
        yield name.removesuffix(".weight"), (parameter.T if is_conv1d else parameter).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_a_file_gives_back_every_parameter(variant, tmp_path):
    model = built(variant)
    write_gguf(tmp_path / "m.gguf", model, None, {}, "F32", FIELDS)
    read = {tensor.name: tensor.weight for tensor in read_gguf(tmp_path / "m.gguf")}
    wanted = dict(weights(model))
    assert read.keys() == wanted.keys()
    for name, weight in wanted.items():
        shifted = "gemma" in variant and weight.ndim == 1  # 1 + w is what a file holds
        np.testing.assert_allclose(read[name], weight, rtol=0, atol=2e-7 if shifted else 0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tensors_are_named_as_the_gguf_library_maps_them(model_type):
    arch = ARCHITECTURES[model_type]
    (enum,) = [a for a in MODEL_ARCH if a.name.lower() == arch.name]
    names = get_tensor_name_map(enum, 3)
    for tensor, module in arch.modules(3):
        if module != "lm_head":  # which the library maps for all architectures, also those that never have it
            assert names.get_name(module) == tensor


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3-wide", "gemma2", "gemma3", "gpt2-untied", "phi3"])
def test_transformers_reads_the_same_model(variant, tmp_path):
    tokenizer = bpe(["bytes of words"], pad_token="<|end|>")
    model = built(variant, len(tokenizer))
    write_gguf(tmp_path / "m.gguf", model, tokenizer, {}, "F32", FIELDS)
    read = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs = dict(read.named_parameters())
    assert type(read) is type(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=2e-7 if "norm" in name else 0)


@pytest.mark.parametrize("plain", ["F16", "BF16"])
def test_matrices_are_rounded_once_and_vectors_never(plain, tmp_path):
    model = built("llama")
    write_gguf(tmp_path / "m.gguf", model, None, {}, plain, FIELDS)
    for tensor in read_gguf(tmp_path / "m.gguf"):
        weight = model.get_submodule(tensor.name).weight
        assert tensor.ggml_type == ("F32" if weight.dim() == 1 else plain)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[plain] if weight.dim() == 2 else torch.float32
        np.testing.assert_array_equal(tensor.weight, weight.to(dtype).float())


def q8(model, *names, seed=0):
    """Random blocks and their codes for some modules."""
    draw = torch.Generator().manual_seed(seed)
    packed, codes = {}, {}
    for name in names:
        weight = model.get_submodule(name).weight
        out, columns = weight.T.shape if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.shape
        codes[name] = torch.randint(0, 256, (out, columns), generator=draw, dtype=torch.uint8)
        scales = torch.rand(out, columns // 32, generator=draw).half().float()
        packed[name] = "Q8_0", pack("Q8_0", codes[name], scales, None, {})
    return packed, codes


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("llama", [f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"]),
        ("gpt-neox", ["gpt_neox.layers.0.attention.query_key_value"]),
        ("gpt2", ["transformer.h.1.attn.c_attn", "transformer.wte"]),
    ],
)
def test_packed_codes_come_back_in_the_order_of_the_module(variant, names, tmp_path):
    model = built(variant)
    packed, codes = q8(model, *names)
    write_gguf(tmp_path / "m.gguf", model, None, packed, "F16", FIELDS)
    read = {tensor.name: tensor for tensor in read_gguf(tmp_path / "m.gguf")}
    for name in names:
        assert read[name].ggml_type == "Q8_0"
        np.testing.assert_array_equal(unpack_codes("Q8_0", read[name].data), codes[name])
        np.testing.assert_array_equal(read[name].data, packed[name][1])


def test_rows_of_a_llamas_queries_interleave_the_halves_of_each_head():
    config = T.LlamaConfig(**GROUPED)
    order = rows("model.layers.0.self_attn.k_proj", config)
    assert order[:6].tolist() == [0, 8, 1, 9, 2, 10]
    assert sorted(order) == list(range(32))
    assert rows("model.layers.0.self_attn.v_proj", config) is None
    assert rows("model.layers.0.self_attn.q_proj", T.Qwen2Config(**GROUPED)) is None


def test_llama_3s_rope_factors_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = T.LlamaConfig(**GROUPED | {"head_dim": 128}, rope_parameters=LLAMA3 | {"rope_theta": 1e3})
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1e3 ** -(torch.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(rope_factors(config), plain / stretched, rtol=1e-5)
    assert rope_factors(T.LlamaConfig(**GROUPED)) is None


def test_a_file_describes_itself(tmp_path):
    model = built("llama-biased")
    packed, _ = q8(model, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    write_gguf(tmp_path / "m.gguf", model, None, packed, "F16", FIELDS | {"description": "small"})
    found = fields(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.description": "small",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gptq_awq.method": "none",
        "llama.context_length": 128,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 64,
        "tokenizer.ggml.model": "none",
    }
    assert {key: found.get(key) for key in wanted} == wanted


def test_a_mix_of_k_quants_is_called_medium(tmp_path):
    model = T.LlamaForCausalLM(T.LlamaConfig(**GROUPED | {"hidden_size": 256, "head_dim": 64}))

    def blocks(kind, name, size):
        return kind, np.zeros((len(model.get_submodule(name).weight), size), np.uint8)

    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    head = {"lm_head": blocks("Q6_K", "lm_head", 210)}
    small = {name: blocks("Q4_K", name, 144) for name in names} | head
    for packed, file_type in ((small, 14), (small | {names[2]: blocks("Q6_K", names[2], 210)}, 15), (head, 18)):
        write_gguf(tmp_path / "m.gguf", model, None, packed, "F16", FIELDS)
        assert fields(tmp_path / "m.gguf")["general.file_type"] == file_type


def test_a_tied_head_is_stored_once_unless_it_is_packed_apart(tmp_path):
    model = built("qwen3-wide")
    both, _ = q8(model, "lm_head", "model.embed_tokens")
    for packed, wanted in (
        ({}, {"model.embed_tokens": "F16"}),
        ({"lm_head": both["lm_head"]}, {"model.embed_tokens": "F16", "lm_head": "Q8_0"}),
        ({"model.embed_tokens": both["model.embed_tokens"]}, {"model.embed_tokens": "Q8_0"}),
    ):
        write_gguf(tmp_path / "m.gguf", model, None, packed, "F16", FIELDS)
        read = {tensor.name: tensor.ggml_type for tensor in read_gguf(tmp_path / "m.gguf")}
        assert {name: read[name] for name in ("model.embed_tokens", "lm_head") if name in read} == wanted


def test_where_llama_cpp_ignores_windows_the_context_is_one_window(tmp_path, caplog):
    model = T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=32))
    with caplog.at_level(logging.WARNING):
        write_gguf(tmp_path / "m.gguf", model, None, {}, "F16", FIELDS)
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 32
    assert "sliding windows" in caplog.text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda: CONFIGS["opt"](), "written for llama, mistral, .* not for opt"),
        (lambda: T.LlamaConfig(**GROUPED, hidden_act="gelu"), "no gelu activation"),
        (
            lambda: T.LlamaConfig(
                **GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "dynamic",
        ),
        (lambda: T.LlamaConfig(**GROUPED, rope_parameters=YARN), "no yarn rope"),
        (lambda: T.Qwen3Config(**GROUPED, attention_bias=True), "no attention_bias"),
        (lambda: T.Qwen2Config(**GROUPED, head_dim=32), "attention wider"),
        (lambda: T.GemmaConfig(**GEMMA, tie_word_embeddings=False), "output layer"),
        (lambda: T.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=256), "query_pre_attn_scalar=256"),
        (lambda: T.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=16, use_bidirectional_attention=True), "bidirect"),
        (lambda: T.GPT2Config(scale_attn_by_inverse_layer_idx=True), "other scale"),
        (lambda: T.GPTNeoXConfig(attention_bias=False), "attention without bias"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        check_architecture(config())


def test_wrong_requests_are_refused(tmp_path):
    path, model = tmp_path / "m.gguf", built("gemma")
    with pytest.raises(UserError, match="plain_dtype=F8"):
        write_gguf(path, model, None, {}, "F8", FIELDS)
    with pytest.raises(ValueError, match=r"no module model\.nothing"):
        write_gguf(path, model, None, {"model.nothing": ("Q8_0", np.zeros((1, 34), np.uint8))}, "F16", FIELDS)
    with pytest.raises(UserError, match="no output layer"):
        write_gguf(path, model, None, q8(model, "lm_head")[0], "F16", FIELDS)
    with pytest.raises(ValueError, match="don't hold"):
        write_gguf(path, model, None, {"model.embed_tokens": ("Q8_0", np.zeros((64, 34), np.uint8))}, "F16", FIELDS)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"no place for model\.extra"):
        write_gguf(path, model, None, {}, "F16", FIELDS)
    large = built("llama")
    large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="F16 cannot hold"):
        write_gguf(path, large, None, {}, "F16", FIELDS)
