"""Tokenizers of GGUF files: llama.cpp gives transformers' ids, or the export is refused; Modelfiles for Ollama."""

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.gguf_models import bpe, built, exported, fields
from tokenizers import AddedToken

from gptq_awq.errors import UserError
from gptq_awq.export.engines import find
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.modelfile import modelfile

QWEN2 = (
    r"split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
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


@pytest.fixture(scope="module")
def llama_cpp(converter):
    if find("xllamacpp", "gguf") is None:
        pytest.skip("engine xllamacpp is not installed (scripts/install_engine.py xllamacpp)")


def checked(tokenizer, **options):
    """What export says of a tokenizer before calibration."""
    return GGUFFormat(**options).check_model([], built("llama", len(tokenizer)), tokenizer)


@pytest.mark.usefixtures("llama_cpp")
def test_a_pre_tokenizer_that_the_converter_does_not_know_is_found_by_asking_llama_cpp(tmp_path):
    tokenizer = bpe([QWEN2, "bytes"], pad_token="<|end|>")
    tokenizer.chat_template = CHATML
    found = fields(exported(tmp_path, built("llama", len(tokenizer)), tokenizer))
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.chat_template"] == CHATML
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.usefixtures("llama_cpp")
def test_other_ids_than_transformers_are_refused_or_said(caplog):
    tokenizer = bpe(["bytes of words"])
    checked(tokenizer, pre="gpt-2")
    with pytest.raises(UserError, match=r"other token ids .* first for .*export\.gguf\.other_ids=allow"):
        checked(tokenizer, pre="qwen2")
    checked(tokenizer, pre="qwen2", other_ids="allow")
    assert "other token ids" in caplog.text


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("strips", ["rstrip", "lstrip", "single_word"])
def test_added_tokens_that_llama_cpp_would_not_strip_for_are_refused(strips):
    tokenizer = bpe(["bytes of words"])
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, **{strips: True})], special_tokens=True)
    with pytest.raises(UserError, match="other token ids"):
        checked(tokenizer, pre="gpt-2")


@pytest.mark.usefixtures("converter")
def test_a_tokenizer_that_llama_cpp_has_no_kind_for_is_refused(tiny_folder):
    model = T.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with pytest.raises(UserError, match=r"export\.formats=gguf"):
        GGUFFormat().check_model([], model, T.AutoTokenizer.from_pretrained(tiny_folder))
