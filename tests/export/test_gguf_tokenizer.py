"""Tokenizers of GGUF files; and what llama.cpp, where it is installed, makes of files, words included."""

import json
import subprocess

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.gguf_models import CORPUS, FIELDS, VARIANTS, bpe, built, fields
from helpers.tiny_models import GROUPED, tiny_tokens
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Split

from gptq_awq.errors import UserError
from gptq_awq.export.engines import answer, find
from gptq_awq.export.gguf import pack_weight
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack
from gptq_awq.export.gguf_file import read_gguf, write_gguf
from gptq_awq.export.gguf_tokenizer import PRE_TOKENIZERS, modelfile, vocabulary
from gptq_awq.grids.mix import llama_grid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.solvers.rtn import RTN

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
    if kind.levels or kind.float_scale:  # which don't take any code, or any scale
        grid = ScaledFloatGrid(tensor_scale=1.0) if ggml_type == "NVFP4" else llama_grid(ggml_type.lower())
        weight = 0.05 * torch.randn(out, columns, generator=draw)
        return pack_weight(RTN().solve(weight, None, grid).quantized)[1]
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
