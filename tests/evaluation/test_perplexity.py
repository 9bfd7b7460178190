import math

import pytest
import torch
import transformers
from helpers.architectures import tiny_architecture
from helpers.scored_models import ARCHITECTURES, plain_losses, postprocessing_model, windows
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens

from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.evaluation import head as head_module
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import perplexity, token_losses


@pytest.fixture(params=[*ARCHITECTURES, "gemma2", "granite", "cohere"])
def model(request):
    return tiny_model(request.param) if request.param in CONFIGS else postprocessing_model(request.param)


def test_the_head_of_the_hidden_states_is_the_model(model):
    head, ids = Head.of(model), tiny_tokens(1, 24)
    hidden = head.hidden(ids)[0]
    logits = torch.cat([head(hidden[:7]), head(hidden[7:])])
    torch.testing.assert_close(logits, model(ids).logits[0], rtol=1e-5, atol=1e-5)


def test_token_losses_equal_a_plain_loop(model):
    tokens = windows()
    scores = token_losses(model, tokens)
    assert scores.nll.shape == (4, 31)
    assert scores.hidden.shape[:2] == (4, 31)
    torch.testing.assert_close(scores.nll, plain_losses(model, tokens.ids), rtol=1e-5, atol=1e-5)


HEADS = {
    "llama4_text": "a model that names itself its decoder",
    "modernbert-decoder": "a decoder that is the head",
    "xlstm": "a cache that its own code can't go on from",
    "prophetnet": "a head that reads another stream than the last hidden states",
}


@pytest.mark.parametrize("name", HEADS, ids=HEADS.values())
def test_models_without_a_common_split_are_scored_as_they_compute(name):
    model, tokens = tiny_architecture(name), windows()
    scores = token_losses(model, tokens)
    torch.testing.assert_close(scores.nll, plain_losses(model, tokens.ids), rtol=1e-4, atol=1e-4)
    assert Head.of(model).whole == (name == "prophetnet")
    same = divergence(model, tokens, scores)
    torch.testing.assert_close(same.nll, scores.nll)
    assert float(same.kl.abs().max()) < 1e-6


def test_perplexity_equals_the_original_codes():
    model, tokens = tiny_model("llama"), windows()
    count, length = tokens.ids.shape
    total = sum(model(row[None], labels=row[None]).loss.item() * length for row in tokens.ids)
    assert perplexity(token_losses(model, tokens).nll) == pytest.approx(math.exp(total / (count * length)), rel=1e-5)


def test_losses_do_not_depend_on_the_chunk(monkeypatch):
    model, tokens = tiny_model("llama"), windows()
    whole = token_losses(model, tokens)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 5 * 64)  # 5 tokens of 64 words
    assert [len(range(31)[part]) for part in Head.of(model).chunks(31)] == [5] * 6 + [1]
    torch.testing.assert_close(token_losses(model, tokens).nll, whole.nll, rtol=1e-6, atol=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny_model("llama")
    model.lm_head.weight.zero_()
    assert perplexity(token_losses(model, windows()).nll) == pytest.approx(64)


def test_scoring_leaves_the_model_as_it_was():
    model, ids = tiny_model("gpt2"), tiny_tokens(1)
    before = model(ids).logits
    token_losses(model, windows())
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.get_decoder())


def test_a_window_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match=r"eval\.perplexity\.seqlen=129 .* 128 tokens"):
        token_losses(tiny_model("llama"), windows(1, 129))


def test_nonfinite_logits_are_refused_and_located():
    model, tokens = tiny_model("llama"), windows()
    word = next(int(i) for i in tokens.ids[2, 5:] if i not in tokens.ids[:2])
    model.model.embed_tokens.weight[word] = math.nan
    with pytest.raises(UserError, match=r"not finite \(eval text text, window 2, .*dtype=float32"):
        token_losses(model, tokens)


def test_a_model_whose_head_needs_more_than_hidden_states_is_scored_whole():
    model = tiny_model("llama")
    forward = model.forward

    def biased_by_its_input(input_ids, **kwargs):
        output = forward(input_ids, **kwargs)
        output.logits = output.logits + torch.nn.functional.one_hot(input_ids, 64)
        return output

    model.forward = biased_by_its_input
    scores, tokens = token_losses(model, windows()), windows()
    torch.testing.assert_close(scores.nll, plain_losses(model, tokens.ids), rtol=1e-5, atol=1e-5)


def test_a_model_that_names_no_output_layer_is_scored(monkeypatch):
    model, tokens = tiny_model("llama"), windows()
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda _: None)
    assert not Head.of(model).divisible
    torch.testing.assert_close(token_losses(model, tokens).nll, plain_losses(model, tokens.ids), rtol=1e-5, atol=1e-5)


def test_a_model_that_computes_no_logits_is_refused():
    model = tiny_model("llama")
    model.forward = lambda **_: 1 / 0
    with pytest.raises(UserError, match=r"model=LlamaForCausalLM.*ZeroDivisionError.*eval=none"):
        token_losses(model, windows())


def test_padded_windows_are_refused():
    ids = tiny_tokens(2, 8)
    with pytest.raises(ValueError, match="without padding"):
        token_losses(tiny_model("llama"), make_token_set("text", ids, torch.ones_like(ids).bool(), "random"))


def test_a_trained_model_scores_its_own_domain_well(stories15m, shared):
    model = transformers.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories15m)
    text = (shared / "data/tinystories/tinystories_val.txt").read_text()[:6000]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: 4 * 256]).view(4, 256)
    scores = token_losses(model, make_token_set("stories", ids, None, "file"))
    with torch.no_grad():
        torch.testing.assert_close(scores.nll, plain_losses(model, ids), rtol=1e-4, atol=1e-4)
    assert 3 < perplexity(scores.nll) < 6
