"""Text samples: greedy text is the argmax of the model's own forwards; a parting is the first token that differs."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.continuation import Sampling, continue_greedily, write
from gptq_awq.evaluation.samples.difference import Parting, Sample, compared, read_samples, write_samples
from gptq_awq.evaluation.samples.prompts import Prompt, read_prompts

PROMPTS = [Prompt("the cat"), Prompt("a small house")]
TOKENS = 12


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def other(model):
    """The same model with weights that are off by a third of their spread."""
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    return changed


@torch.no_grad()
def by_hand(model, ids, steps):
    """Greedy tokens and the whole distribution at each step, one forward over the whole text per token."""
    distributions = []
    for _ in range(steps):
        row = model(ids, use_cache=False).logits[0, -1].softmax(-1)
        distributions.append(row)
        ids = torch.cat([ids, row.argmax()[None, None]], dim=1)
    return ids[0, -steps:].tolist(), distributions


def test_a_greedy_continuation_is_the_argmax_of_whole_forwards(model, tokenizer):
    for prompt, found in zip(PROMPTS, continue_greedily(model, tokenizer, PROMPTS, TOKENS), strict=True):
        tokens, distributions = by_hand(model, prompt.encode(tokenizer), len(found.tokens))
        assert list(found.tokens) == tokens
        for step, (token, row) in enumerate(zip(tokens, distributions, strict=True)):
            assert found.probability(step, token) == pytest.approx(float(row[token]), rel=1e-3)


def test_pieces_join_to_the_text_that_the_tokenizer_decodes(model, tokenizer):
    for found in continue_greedily(model, tokenizer, PROMPTS, TOKENS):
        last = int(found.prompt.encode(tokenizer)[0, -1])
        assert tokenizer.decode([last]) + found.text == tokenizer.decode(
            [last, *found.tokens], skip_special_tokens=True
        )


def test_a_parting_is_the_first_other_token_with_both_models_probabilities(model, other, tokenizer):
    full, own = (continue_greedily(each, tokenizer, PROMPTS, TOKENS) for each in (model, other))
    partings = [Parting.of(a, b) for a, b in zip(full, own, strict=True)]
    assert any(partings)
    for prompt, a, b, parting in zip(PROMPTS, full, own, partings, strict=True):
        if parting is None:
            assert a.tokens == b.tokens
            continue
        same = parting.token
        assert a.tokens[:same] == b.tokens[:same]
        assert a.tokens[same] != b.tokens[same]
        assert a.text[: parting.at] == b.text[: parting.at]
        ids = torch.cat([prompt.encode(tokenizer), torch.tensor([a.tokens[:same]]).long()], dim=1)
        for each, first, second, gap in (
            (model, a.tokens[same], b.tokens[same], parting.full_gap),
            (other, b.tokens[same], a.tokens[same], parting.own_gap),
        ):
            row = by_hand(each, ids, 1)[1][0]
            floor = row.sort(descending=True).values[:100][-1]  # of a token that isn't among the likeliest
            assert gap == pytest.approx(float(row[first] - torch.maximum(row[second], floor)), abs=1e-4)


def test_a_model_never_parts_from_itself(model, tokenizer):
    full = continue_greedily(model, tokenizer, PROMPTS, TOKENS)
    assert all(sample.parting is None and sample.own == sample.full for sample in compared(full, full))


def test_streamed_greedy_text_is_the_greedy_continuation(model, tokenizer):
    heard: list[str] = []
    text = write(model, tokenizer, PROMPTS[0], Sampling(tokens=TOKENS), heard.append)
    (greedy,) = continue_greedily(model, tokenizer, PROMPTS[:1], TOKENS)
    assert "".join(heard) == text
    assert text == greedy.text


def test_a_seed_draws_the_same_text_again(model, tokenizer):
    def drawn(seed):
        return write(model, tokenizer, PROMPTS[0], Sampling(temperature=1.0, seed=seed, tokens=TOKENS), str)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_prompts_beyond_the_context_and_options_out_of_range_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="context"):
        continue_greedily(model, tokenizer, PROMPTS, 100_000)
    with pytest.raises(UserError, match="top-p"):
        Sampling(top_p=0.0)


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = [
        Sample("p", "one\ntwo", "one three", Parting(1, 3, "two", " three", 0.25, 0.5), 2),
        Sample("q", "", "", None, 1),
    ]
    write_samples(samples, tmp_path)
    assert read_samples(tmp_path) == samples
    assert read_samples(tmp_path / "nowhere") == []
    for wrong in ('{"prompt": 1}', "[1]", '{"prompt": "p", "full": 1, "own": "o", "parting": null, "tokens": 1}'):
        (tmp_path / "samples.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match=r"samples\.jsonl"):
            read_samples(tmp_path)


def test_prompts_come_a_line_or_a_row_each(tmp_path):
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n two \n")
    rows.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [p.text for p in read_prompts(lines, "o")] == [p.text for p in read_prompts(rows, "o")] == ["one", "two"]
    lines.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(lines, "o")


def test_a_chat_template_wraps_the_turn_and_its_errors_are_one_line(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ messages[0]['content'] }} dog"
    assert chatty.decode(Prompt("the cat").encode(chatty)[0]) == chatty.decode(chatty("the cat dog")["input_ids"])
    assert Prompt("hi", chat=False).encode(chatty).tolist() == Prompt("hi").encode(tokenizer).tolist()
    chatty.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(UserError, match="no users"):
        Prompt("hi").encode(chatty)
