"""GGUF files: tensors in llama.cpp's terms, hyperparameters, tokenizers; read back by transformers and llama.cpp."""

import json
import logging
import subprocess

import numpy as np
import pytest
import torch
import transformers as T  # noqa: N812
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from tiny_models import CONFIGS, GROUPED, SPECIAL, tiny_tokens
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

from gptq_awq.errors import UserError
from gptq_awq.export.engines import answer, find
from gptq_awq.export.gguf_architecture import ARCHITECTURES, rope_factors
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack, unpack_codes
from gptq_awq.export.gguf_file import check_architecture, read_gguf, rows, write_gguf
from gptq_awq.export.gguf_tokenizer import PRE_TOKENIZERS, modelfile, vocabulary

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA = GROUPED | {"head_dim": 16}
VARIANTS = {
    "llama": CONFIGS["llama"],
    "llama-biased": lambda: T.LlamaConfig(
        **GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32
    ),
    "llama-3.1": lambda: T.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "llama-linear": lambda: T.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-256": lambda: T.LlamaConfig(**GROUPED | {"hidden_size": 256, "intermediate_size": 512}),
    "mistral": CONFIGS["mistral"],
    "qwen2": CONFIGS["qwen2"],
    "qwen2-yarn": lambda: T.Qwen2Config(**GROUPED, rope_parameters=YARN),
    "qwen3": CONFIGS["qwen3"],
    "qwen3-wide": lambda: T.Qwen3Config(**GROUPED, head_dim=128, tie_word_embeddings=True),
    "gemma": lambda: T.GemmaConfig(**GEMMA),
    "gemma2": lambda: T.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=0.5, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: T.Gemma3TextConfig(
        **GEMMA,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": CONFIGS["phi3"],
    "phi3-partial": lambda: T.Phi3Config(
        **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gpt2": CONFIGS["gpt2"],
    "gpt2-untied": lambda: T.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=1024, tie_word_embeddings=False, **SPECIAL
    ),
    "gpt-neox": CONFIGS["gpt-neox"],
    "gpt-neox-serial": lambda: T.GPTNeoXConfig(
        **{k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}, use_parallel_residual=False
    ),
}
FIELDS = {"name": "tiny", "gptq_awq.method": "none"}


def built(variant: str, vocab_size: int = 64):
    """A random model whose weights are large enough that every part of it shows in the logits."""
    config = VARIANTS[variant]()
    config.vocab_size = vocab_size
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


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


def fields(path):
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


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


# Tokenizers.

CORPUS = [
    "It's IT'S it'Ll x'RE 'tis ''s we've I'm he'LL. The cat sees the dog and then the cat runs, red tree house!",
    "12345 1 22 333 4444 5.5e-7 x=3.14; a  5 and 1234   def f(x):\n\treturn x**2  # \t tab\r\n\r\n",
    "CamelCaseWORDSmixedUP ÀÉÎõü //comment\n/// x /* y */\n\n/ !@#$%^&*()_+-=[]{}|;':\",./<>? a_b-c",
    "Ünïcödé 日本語テキスト 한국어 🚀😶‍🌫️ нещо на Български ?我想在apple工作1314151天～ \u00a0nbsp\u3000x",
]
TEXTS = [
    *CORPUS,
    "Hello world",
    " leading and trailing  \n\n",
    "a\r\nb\r\n\r\nc \r\n d \n \n\n \n\n\n \t \t\t",
    "''''''```````\"\"\"\"......!!!!!!?????? ------=======",
    "    indented\n\t\ttabs  and   spaces   \n",
    "① ½ ٣٤٥ 🙂🙃 x🙂y",
    "x" * 100,
]


def bpe(steps, ignore_merges=False, **special):
    """A byte-level tokenizer of some 500 tokens that splits texts in the way PRE_TOKENIZERS describes."""
    made = {
        "bytes of words": lambda: ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": lambda: ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": lambda: Digits(individual_digits=True),
    }
    parts = [made[s]() if s in made else Split(Regex(s.removeprefix("split ")), "isolated") for s in steps]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | special))


def test_a_pre_tokenizer_is_recognized_however_it_is_spelled():
    for (steps, ignore_merges), name in PRE_TOKENIZERS.items():
        assert vocabulary(bpe(steps, ignore_merges)).pre == name
    (qwen2,) = [steps for (steps, _), name in PRE_TOKENIZERS.items() if name == "qwen2"]
    tokenizer = bpe(qwen2)
    pattern = Regex(qwen2[0].removeprefix("split "))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [Split(pattern, "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    assert vocabulary(tokenizer).pre == "qwen2"


def test_a_tokenizer_that_llama_cpp_cannot_reproduce_is_refused(tiny_folder):
    unknown = bpe(["digits", "bytes"])
    with pytest.raises(UserError, match=r"recognized are .* export\.gguf\.pre"):
        vocabulary(unknown)
    assert vocabulary(unknown, pre="qwen2").pre == "qwen2"
    with pytest.raises(UserError, match="WordLevel"):
        vocabulary(T.AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(UserError, match="tokens for an embedding of 64 rows"):
        vocabulary(bpe(["bytes of words"]), rows=64)
    with pytest.raises(UserError, match="not a fast tokenizer"):
        vocabulary(object())


def test_rows_without_a_token_are_unused():
    words = vocabulary(bpe(["bytes of words"]), rows=640)
    assert words.tokens[639] == "[PAD639]"
    assert words.types[639].name == "UNUSED"
    assert words.types[0].name == "CONTROL"
    assert len(set(words.tokens)) == 640


def respelled(tokenizer):
    """A SentencePiece tokenizer in the older of its two spellings, which always puts a space first."""
    from tokenizers import normalizers

    old = T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    old.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    old.backend_tokenizer.pre_tokenizer = None
    return old


def test_a_sentencepiece_tokenizer_is_a_llama_whose_scores_are_ranks(stories15m, caplog):
    tokenizer = T.AutoTokenizer.from_pretrained(stories15m)
    words = vocabulary(tokenizer)
    assert (words.model, words.add_bos, words.add_eos, words.add_space_prefix) == ("llama", True, False, True)
    assert words.special == {"bos": 1, "eos": 2, "unknown": 0}
    assert [kind.name for kind in words.types[:4]] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    pieces = [words.scores[i] for i in range(259, 29000)]
    assert pieces == sorted(pieces, reverse=True)  # ids of pieces follow their scores
    assert not caplog.text
    assert vocabulary(respelled(tokenizer)).scores == words.scores
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    content["model"]["merges"] = content["model"]["merges"][:5000] + content["model"]["merges"][5001:]
    backend_like = T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>")
    vocabulary(backend_like)
    assert "1 not in the tokenizer" in caplog.text


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_modelfile_says_what_is_certain():
    tokenizer = bpe(["bytes of words"])
    assert modelfile("m.gguf", tokenizer) == ('FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|end|>"\n')
    tokenizer.chat_template = CHATML
    text = modelfile("m.gguf", tokenizer)
    assert '\nSYSTEM """Be brief."""\n' in text
    assert '<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer)


def test_a_tokenizer_and_its_chat_template_are_in_the_file(tmp_path):
    tokenizer = bpe(["digits", "bytes of words"], bos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = CHATML
    model = T.LlamaForCausalLM(T.LlamaConfig(**GROUPED | {"vocab_size": 608}))
    write_gguf(tmp_path / "m.gguf", model, tokenizer, {}, "F16", FIELDS)
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.chat_template"] == CHATML
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (0, False)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 608
    again = T.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again("The cat sees a dog")["input_ids"] == tokenizer("The cat sees a dog")["input_ids"]


# llama.cpp, where it is installed.


@pytest.fixture(scope="session")
def llama_cpp():
    if find("llamacpp", "gguf") is None:
        pytest.skip("engine llamacpp is not installed (scripts/install_engine.py llamacpp)")

    def logits(path, ids):
        return answer("llamacpp", path, ids, "gguf").logits

    return logits


TOKENIZE = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
server = xllamacpp.Server(params)
answers = []
for text in json.load(sys.stdin):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    answers.append(json.load(urllib.request.urlopen(request))["tokens"])
print("tokens:" + json.dumps(answers))
"""


@pytest.fixture(scope="session")
def llama_cpp_tokens():
    """Token ids of texts, by the file alone."""
    python = find("xllamacpp", "gguf")
    if python is None:
        pytest.skip("engine xllamacpp is not installed (scripts/install_engine.py xllamacpp)")

    def tokens(path, texts):
        command = [str(python), "-c", TOKENIZE, str(path)]
        done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("tokens:")]
        return json.loads(line.removeprefix("tokens:"))

    return tokens


GELU_TABLE = 3e-3
"""llama.cpp looks gelu up in a table of float16."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits(variant, llama_cpp, tmp_path):
    model = built(variant)
    write_gguf(tmp_path / "m.gguf", model, None, {}, "F32", FIELDS)
    ids = tiny_tokens(1, 64)
    ours, theirs = model(ids).logits, llama_cpp(tmp_path / "m.gguf", ids)
    tolerance = GELU_TABLE if variant.startswith(("gemma", "gpt")) else 2e-6 * ours.abs().max().item()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


def random_blocks(ggml_type, out, columns, draw):
    """The bytes of a matrix of weights of about 0.05."""
    kind = BLOCK_TYPES[ggml_type]
    low, high = kind.scale_range
    codes = torch.randint(0, kind.max_code + 1, (out, columns), generator=draw, dtype=torch.uint8)
    blocks = columns // kind.block
    largest = 127 if ggml_type == "IQ4_NL" else kind.max_code
    d = (torch.rand(out, blocks, generator=draw) * 0.1 / largest / max(1, high)).half().float()
    subs = torch.randint(low, high + 1, (out, blocks * kind.sub_blocks), generator=draw)
    minimum = (-d * kind.max_code / 2).half().float()
    store = {"d": d, "dmin": -minimum, "scale_codes": subs, "min_codes": subs}
    return pack(ggml_type, codes, d, minimum if kind.minimum else None, store)


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_llama_cpp_decodes_every_block_type_to_the_same_weights(ggml_type, llama_cpp, tmp_path):
    model = built("llama-256")
    draw, packed = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            packed[name] = ggml_type, random_blocks(ggml_type, *module.weight.shape, draw)
    write_gguf(tmp_path / "m.gguf", model, None, packed, "F32", FIELDS)
    for tensor in read_gguf(tmp_path / "m.gguf"):
        model.get_submodule(tensor.name).weight.copy_(torch.from_numpy(tensor.weight))
    ids = tiny_tokens(1, 64)
    ours = model(ids).logits
    torch.testing.assert_close(llama_cpp(tmp_path / "m.gguf", ids), ours, rtol=0, atol=1e-5 * ours.abs().max().item())


def test_llama_cpp_reads_a_real_model_and_its_words(stories15m, llama_cpp, llama_cpp_tokens, tmp_path):
    model = T.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    tokenizer = respelled(T.AutoTokenizer.from_pretrained(stories15m))
    write_gguf(tmp_path / "m.gguf", model, tokenizer, {}, "F32", FIELDS)
    texts = [*TEXTS, "", "Once upon a time there was<s> a fox.</s>"]
    assert llama_cpp_tokens(tmp_path / "m.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]
    ids = tokenizer("Once upon a time, there was a little girl who had a red ball." * 3, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        ours = model(ids).logits
    torch.testing.assert_close(llama_cpp(tmp_path / "m.gguf", ids), ours, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("key", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_llama_cpp_splits_words_as_transformers_does(key, name, llama_cpp_tokens, tmp_path):
    tokenizer = bpe(*key)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GROUPED | {"vocab_size": len(tokenizer)}))
    write_gguf(tmp_path / "m.gguf", model, tokenizer, {}, "F16", FIELDS)
    assert llama_cpp_tokens(tmp_path / "m.gguf", TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
