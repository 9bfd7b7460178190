"""Laws of the fused pass over logits: it is log_softmax, KL and argmax of torch in float64, whatever the tiles."""

import numpy as np
import pytest
import torch
from helpers.scored_models import disturb, windows
from helpers.tiny_models import tiny_model

from gptq_awq.errors import UserError
from gptq_awq.evaluation import head as head_module
from gptq_awq.evaluation.divergence import compare, divergence
from gptq_awq.evaluation.head import Head
from gptq_awq.evaluation.perplexity import next_token_nll, token_losses
from gptq_awq.evaluation.tiles import comparison, predictions
from gptq_awq.kernels import softmax

INF = float("inf")


class Logits:
    """A head whose states are the logits themselves, cut into tiles of any width."""

    def __init__(self, width, rows=7):
        self.width, self.rows = width, rows

    def __call__(self, states, words, output=None):
        return states[:, words]

    def laying_out_once(self):
        return self

    def tiles(self, tokens):
        for start in range(0, tokens, self.rows):
            rows = slice(start, min(start + self.rows, tokens))
            yield rows, [slice(a, min(a + self.width, WORDS)) for a in range(0, WORDS, self.width)]


WORDS = 1000
WIDTHS = [8, 37, 256, 300, WORDS]


def kinds(tokens=23):
    """Pairs of logits (p, q) as models have them, and as they never should."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tokens, WORDS, generator=draw) for _ in "pq")
    rising = torch.linspace(-60, 60, WORDS).expand(tokens, -1)
    masked = (torch.rand(tokens, WORDS, generator=draw) < 0.3).index_fill(1, torch.tensor([0]), False)
    return {
        "random": (3 * x, 3 * y),
        "close": (3 * x, 3 * x + 1e-2 * y),
        "equal": (3 * x, 3 * x),
        "flat": (torch.zeros_like(x), torch.full_like(x, -7.0)),
        "peaked": (100 * x, 100 * y),
        "far from zero": (3 * x + 1e4, 3 * y - 1e4),
        "rising, so that every tile has a new maximum": (rising + x, rising - y),
        "falling": (rising.flip(1) + x, rising.flip(1) - y),
        "masked alike": (x.masked_fill(masked, -INF), y.masked_fill(masked, -INF)),
        "masked in p": (x.masked_fill(masked, -INF), y),
        "long masked beginnings": (x.clone().index_fill_(1, torch.arange(700), -INF), y),
        "coarse, with ties": ((2 * x).round(), (2 * y).round()),
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("width", WIDTHS)
def test_the_pass_equals_torch_in_float64(kind, width):
    p, q = kinds()[kind]
    targets = torch.arange(len(p)) * 31 % WORDS
    nll, kl, agree = comparison(Logits(width), p, q, targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact_nll = -log_q.gather(1, targets[:, None])[:, 0]
    exact_kl = torch.where(log_p > -INF, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    torch.testing.assert_close(nll.double(), exact_nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.double(), exact_kl, rtol=2e-6, atol=1e-6)
    assert torch.equal(agree, p.argmax(-1) == q.argmax(-1))
    alone, best = predictions(Logits(width), q, targets)
    assert torch.equal(alone, nll)  # one model's losses are the same bits, compared with another or not
    assert torch.equal(best, q.argmax(-1))


def test_small_divergences_survive():
    p, _ = kinds()["random"]
    moved = p + 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    log_p, log_q = p.double().log_softmax(-1), moved.double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    found = comparison(Logits(256), p, moved, torch.zeros(len(p), dtype=torch.long))[1].double().mean()
    assert exact < 1e-6
    assert found.item() == pytest.approx(exact.item(), abs=3e-8)


@pytest.mark.parametrize("width", WIDTHS)
def test_equal_logits_have_a_divergence_of_exactly_zero(width):
    for p, _ in kinds().values():
        _, kl, agree = comparison(Logits(width), p, p.clone(), torch.zeros(len(p), dtype=torch.long))
        assert not kl.any()
        assert agree.all()


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), INF])
@pytest.mark.parametrize("where", [0, 299, 300, WORDS - 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_one_bad_logit_makes_its_token_and_no_other_not_finite(bad, where, width):
    p, q = kinds()["random"]
    q[3, where] = bad
    targets = torch.full((len(q),), 500)
    nll, kl, _ = comparison(Logits(width), p, q, targets)
    for values in (nll, kl, predictions(Logits(width), q, targets)[0]):
        assert values.isfinite().tolist() == [row != 3 for row in range(len(q))]
    nll, kl, _ = comparison(Logits(width), q, p, targets)
    assert nll.isfinite().all()
    assert kl.isfinite().tolist() == [row != 3 for row in range(len(q))]


def test_a_word_that_only_p_can_say_is_infinitely_far():
    p, q = kinds()["random"]
    q[:, 5] = -INF
    assert comparison(Logits(300), p, q, torch.zeros(len(p), dtype=torch.long))[1].isposinf().all()


def test_a_token_without_any_word_is_reported():
    p, q = kinds()["random"]
    q[2] = -INF
    nll, kl, _ = comparison(Logits(300), p, q, torch.zeros(len(p), dtype=torch.long))
    assert (nll.isfinite() & kl.isfinite()).tolist() == [row != 2 for row in range(len(p))]


def test_exp_is_within_its_bound():
    exp = softmax.exp
    x = np.concatenate([np.linspace(-87, 0, 20001), -np.logspace(-8, 1.9, 2000)]).astype(np.float32)
    values = np.array([exp(v) for v in x], dtype=np.float64)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(values - exact) / exact) < 1.5e-7
    assert exp(np.float32(0)) == 1
    assert exp(np.float32(-INF)) == exp(np.float32(-88)) == 0
    assert np.isnan(exp(np.float32("nan")))


def postprocessed(name):
    from helpers.scored_models import postprocessing_model

    return tiny_model("llama") if name == "llama" else postprocessing_model(name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_parts_of_the_vocabulary_make_the_whole(name):
    model = postprocessed(name)
    head = Head.of(model)
    assert head.divisible
    states = head.hidden(windows(1, 16).ids)[0]
    parts = torch.cat([head(states, slice(0, 10)), head(states, slice(10, 63)), head(states, slice(63, 64))], -1)
    torch.testing.assert_close(parts, head(states), rtol=1e-5, atol=1e-6)
    assert model.get_output_embeddings().weight.shape[0] == 64


def test_a_head_that_needs_its_whole_vocabulary_is_left_whole():
    model = tiny_model("llama")
    forward = model.forward

    def centred(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    model.forward = centred
    head, tokens = Head.of(model), windows(2, 16)
    assert not head.divisible
    exact = torch.stack(
        [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="none") for w in tokens.ids]
    )
    torch.testing.assert_close(token_losses(model, tokens).nll, exact, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_tile(monkeypatch):
    model, tokens = tiny_model("llama"), windows()
    baseline = token_losses(model, tokens)
    disturb(model)
    whole = divergence(model, tokens, baseline)
    monkeypatch.setattr(head_module, "TILE_TOKENS", 5)
    monkeypatch.setattr(head_module, "TILE_WORDS", 7)
    head = Head.of(model)
    assert [rows for rows, _ in head.tiles(12)] == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert [len(range(64)[words]) for words in next(head.tiles(12))[1]] == [7] * 9 + [1]
    parts = divergence(model, tokens, baseline)
    torch.testing.assert_close(parts.nll, whole.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts.agree, whole.agree)


def test_the_torch_path_of_gpus_says_the_same(monkeypatch):
    model, tokens = tiny_model("llama"), windows(1, 32)
    full, targets = Head.of(model).hidden(tokens.ids)[0, :-1], tokens.ids[0, 1:].long()
    disturb(model)
    head = Head.of(model)
    states = head.hidden(tokens.ids)[0, :-1]
    fused = (next_token_nll(head, states, targets), *compare(head, full, states, targets))

    class Elsewhere:  # says that it is a GPU's, in all else it is the tensor
        device = torch.device("cuda")

        def __getitem__(self, part):
            return states[part]

        def __len__(self):
            return len(states)

    plain = (next_token_nll(head, Elsewhere(), targets), *compare(head, full, Elsewhere(), targets))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_broken_head_is_refused_with_its_window():
    model, tokens = tiny_model("llama"), windows(2, 16)
    model.lm_head.weight[40] = float("nan")
    with pytest.raises(UserError, match="window 0, token 0"):
        token_losses(model, tokens)
