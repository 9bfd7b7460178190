"""lm-eval's requests with tokenizers that add special tokens or merge across the end of a context."""

import string

import pytest
import torch
import transformers
from helpers.tiny_models import tiny_model
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from gptq_awq.errors import UserError
from gptq_awq.evaluation.language_model import LanguageModel, special_tokens_behind

CHARACTERS = ["<pad>", "<s>", "</s>", *string.ascii_letters, *" .,\n"]
PLAIN, BOS, EOS, BOTH = "$A", "<s> $A", "$A </s>", "<s> $A </s>"


def tokenizer(template: str = PLAIN, merges: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A token per character, and one for each of `merges`; special tokens as in `template`."""
    tokens = [*CHARACTERS, *(merge.replace("|", "") for merge in merges)]
    pairs = [tuple(merge.split("|")) for merge in merges]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def ids_of(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def ask(kind: str, *args) -> list[Instance]:
    return [Instance(kind, {}, args, 0)]


def log_probability(model, context: list[int], continuation: list[int]) -> float:
    """Sum of the continuation's log probabilities, by one whole forward."""
    log_p = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(context) + i - 1, word]) for i, word in enumerate(continuation))


@pytest.mark.parametrize(
    ("template", "behind"), [(PLAIN, 0), (BOS, 0), (EOS, 1), (BOTH, 1), ("<s> <s> $A </s> </s>", 2)]
)
def test_special_tokens_behind_a_text_are_counted(template, behind):
    assert special_tokens_behind(tokenizer(template)) == behind


@pytest.mark.parametrize("text", ["the cat sat", "<s>the cat sat"])
@pytest.mark.parametrize("template", [PLAIN, BOS, EOS, BOTH])
def test_a_rolling_text_is_scored_once_after_one_bos(template, text, model):
    answer = LanguageModel(model, tokenizer(template)).loglikelihood_rolling(ask("loglikelihood_rolling", text))
    assert answer == [pytest.approx(log_probability(model, [1], ids_of("the cat sat")), rel=1e-5)]


@pytest.mark.parametrize(("template", "before"), [(PLAIN, []), (BOS, [1]), (EOS, []), (BOTH, [1])])
def test_a_choice_follows_bos_and_context_and_no_eos_is_scored(template, before, model):
    lm = LanguageModel(model, tokenizer(template))
    [(answer, _)] = lm.loglikelihood(ask("loglikelihood", "the cat", " sat"))
    assert answer == pytest.approx(log_probability(model, before + ids_of("the cat"), ids_of(" sat")), rel=1e-5)


@pytest.mark.parametrize("template", [PLAIN, BOS, EOS, BOTH])
def test_a_choice_without_context_follows_one_bos(template, model):
    [(answer, _)] = LanguageModel(model, tokenizer(template)).loglikelihood(ask("loglikelihood", "", "sat"))
    assert answer == pytest.approx(log_probability(model, [1], ids_of("sat")), rel=1e-5)


@pytest.mark.parametrize(("template", "before"), [(PLAIN, [1]), (BOS, [1]), (EOS, [1]), (BOTH, [1])])
def test_a_context_of_spaces_moves_into_the_choice(template, before, model):
    [(answer, _)] = LanguageModel(model, tokenizer(template)).loglikelihood(ask("loglikelihood", "  ", "sat"))
    assert answer == pytest.approx(log_probability(model, before, ids_of("  sat")), rel=1e-5)


@pytest.mark.parametrize("template", [PLAIN, EOS])
def test_text_is_generated_after_the_prompt_and_not_after_eos(template, model):
    options = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    [text] = LanguageModel(model, tokenizer(template)).generate_until(ask("generate_until", "the cat", options))
    [expected] = LanguageModel(model, tokenizer(PLAIN)).generate_until(ask("generate_until", "the cat", options))
    assert text == expected


def test_a_choice_inside_of_a_token_that_spans_the_contexts_end_is_encoded_alone(model):
    merging = tokenizer(merges=("a|t",))
    assert len(merging.encode("cat")) == len(merging.encode("ca")) == 2
    [(answer, _)] = LanguageModel(model, merging).loglikelihood(ask("loglikelihood", "the ca", "t"))
    assert answer == pytest.approx(log_probability(model, ids_of("the ca"), ids_of("t")), rel=1e-5)


@pytest.mark.parametrize("context", ["the cat", ""])
def test_a_choice_without_tokens_is_quoted(context, model):
    with pytest.raises(UserError, match=r"^eval\.tasks: the continuation '' .*no tokens") as error:
        LanguageModel(model, tokenizer()).loglikelihood(ask("loglikelihood", context, ""))
    assert "\n" not in str(error.value)


def test_a_lone_surrogate_is_scored_as_a_replacement_character(model):
    replaced = tokenizer()
    replaced.add_tokens(["\ufffd"])  # the vocabulary has 59 tokens, the embedding 64
    lm, index = LanguageModel(model, replaced), len(CHARACTERS)
    [(answer, _)] = lm.loglikelihood(ask("loglikelihood", "the cat", "\ud83d"))
    assert answer == pytest.approx(log_probability(model, ids_of("the cat"), [index]), rel=1e-5)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_token_beyond_the_embedding_is_named_before_any_forward(kind, model):
    added = tokenizer()
    added.add_tokens([f"[{i}]" for i in range(10)])
    lm, calls = LanguageModel(model, added), []
    rest = {"loglikelihood": (" sat",), "loglikelihood_rolling": (), "generate_until": ({"until": []},)}[kind]
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=r"^eval\.tasks: the token '\[9\]' \(68\) is none of the model's 64"):
        getattr(lm, kind)(ask(kind, "the [9] cat", *rest))
    handle.remove()
    assert not calls


def test_padding_beyond_the_embedding_does_not_matter(model):
    padded, plain = tokenizer(), tokenizer()
    padded.add_tokens([f"[{i}]" for i in range(10)])
    padded.pad_token = "[9]"
    questions = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([("the cat", " sat"), ("a", "b")])]
    ours, theirs = (LanguageModel(model, t, batch_size=2).loglikelihood(questions) for t in (padded, plain))
    assert ours == theirs
