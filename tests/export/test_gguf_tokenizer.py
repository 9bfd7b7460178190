"""Tokenizers of GGUF files: llama.cpp gives transformers' ids, or the export is refused; Modelfiles for Ollama."""

import json
from functools import partial

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.gguf_models import bpe, built, exported, fields, pieces
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from gptq_awq.errors import UserError
from gptq_awq.export import gguf_tokenizer
from gptq_awq.export.engines import find, tokenize
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gguf_tokenizer import TEXTS
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


def test_a_modelfile_stops_and_draws_tokens_as_the_generation_settings_say():
    tokenizer = bpe(["bytes of words"])
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a"), 10**6]
    greedy = T.GenerationConfig(eos_token_id=ids, temperature=0.6, repetition_penalty=1.1)
    text = modelfile("m.gguf", tokenizer, greedy)
    assert text.endswith('PARAMETER stop "<|end|>"\nPARAMETER stop "a"\nPARAMETER repeat_penalty 1.1\n')
    drawn = T.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    assert modelfile("m.gguf", tokenizer, drawn).endswith(
        "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER top_p 0.95\n"
    )


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
def test_other_ids_than_transformers_are_refused_or_said():
    tokenizer = bpe(["bytes of words"])
    checked(tokenizer, pre="gpt-2")
    with pytest.raises(UserError, match=r"other token ids .* first for .*export\.gguf\.other_ids=allow"):
        checked(tokenizer, pre="qwen2")
    assert "other token ids" in checked(tokenizer, pre="qwen2", other_ids="allow")[0]


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("strips", ["rstrip", "lstrip", "single_word"])
def test_added_tokens_that_llama_cpp_would_not_strip_for_are_refused(strips):
    tokenizer = bpe(["bytes of words"])
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, **{strips: True})], special_tokens=True)
    with pytest.raises(UserError, match="other token ids"):
        checked(tokenizer, pre="gpt-2")


SPACES = "puts a space before every text and after every special token"


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(("scheme", "notes"), [("first", [SPACES]), ("always", [SPACES]), ("never", [])])
def test_pieces_merge_in_the_order_of_transformers_and_what_spaces_change_is_said(scheme, notes, tmp_path):
    tokenizer = pieces(scheme)
    said = checked(tokenizer)
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))
    path = exported(tmp_path, built("llama", len(tokenizer)), tokenizer)
    wanted = {text: tokenizer(text)["input_ids"] for text in TEXTS if not text[:1].isspace()}
    assert tokenize("xllamacpp", path, wanted, [None]) == [list(wanted.values())]


@pytest.mark.usefixtures("llama_cpp")
def test_a_chat_of_other_ids_is_refused():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}then"
    checked(pieces("never", chat_template=template))
    with pytest.raises(UserError, match="other token ids"):
        checked(pieces("first", chat_template=template))


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("template", "bos", "eos"), [("$A", 0, 0), ("<s> $A", 1, 0), ("$A </s>", 0, 1), ("<s> $A </s>", 1, 1)]
)
@pytest.mark.parametrize(
    "make", [partial(pieces, "never"), partial(bpe, ["bytes of words"], bos_token="<s>", eos_token="</s>")]
)
def test_tokens_around_a_text_are_those_of_transformers(make, template, bos, eos, tmp_path):
    tokenizer = make()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    )
    found = fields(exported(tmp_path, built("llama", len(tokenizer)), tokenizer, pre="gpt-2"))
    assert found["tokenizer.ggml.add_bos_token"] == bool(bos)
    assert found["tokenizer.ggml.add_eos_token"] == bool(eos)


@pytest.mark.usefixtures("llama_cpp")
def test_a_real_models_tokenizer_is_taken(stories15m):
    model = T.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    (said,) = GGUFFormat().check_model([], model, T.AutoTokenizer.from_pretrained(stories15m))
    assert SPACES in said


@pytest.mark.usefixtures("converter")
def test_a_tokenizer_that_llama_cpp_has_no_kind_for_is_refused(tiny_folder):
    model = T.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with pytest.raises(UserError, match=r"export\.formats=gguf"):
        GGUFFormat().check_model([], model, T.AutoTokenizer.from_pretrained(tiny_folder))


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_without_a_role_are_tokens_in_llama_cpp_too(special, tmp_path):
    content = json.loads(pieces("never").backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = special or token["content"] != "<s>"
    made = Tokenizer.from_str(json.dumps(content))
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    assert checked(tokenizer) == []
    kinds = fields(exported(tmp_path, built("llama", len(tokenizer)), tokenizer))["tokenizer.ggml.token_type"]
    assert kinds[tokenizer.convert_tokens_to_ids("<s>")] == (3 if special else 4)


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_is_asked_once_for_a_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_tokenizer, "cache_dir", lambda: tmp_path / "cache")
    tokenizer, asked = pieces("first"), []
    monkeypatch.setattr(gguf_tokenizer, "tokenize", lambda *given: asked.append(1) or tokenize(*given))
    said = checked(tokenizer)
    before = len(asked)
    assert before
    first = fields(exported(tmp_path, built("llama", len(tokenizer)), tokenizer))
    assert (checked(tokenizer), len(asked)) == (said, before)
    (note,) = (tmp_path / "cache" / "vocabularies").iterdir()
    note.write_text("{}")
    assert (checked(tokenizer), len(asked)) == (said, 2 * before), "a damaged note is asked for again"
    assert fields(exported(tmp_path, built("llama", len(tokenizer)), tokenizer)) == first
    checked(pieces("never"))
    assert len(asked) > 2 * before
