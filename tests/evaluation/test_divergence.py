import pytest
import torch
from helpers.scored_models import ARCHITECTURES, disturb, windows
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.evaluation import head as head_module
from gptq_awq.evaluation.divergence import divergence, token_kl
from gptq_awq.evaluation.perplexity import token_losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_does_not_diverge_from_itself(name):
    model, tokens = tiny_model(name), windows()
    baseline = token_losses(model, tokens)
    found = divergence(model, tokens, baseline)
    assert found.kl.abs().max() < 1e-6
    assert found.agree.all()
    assert torch.equal(found.nll, baseline.nll)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_divergence_equals_torchs_over_whole_logits(name):
    model, tokens = tiny_model(name), windows()
    baseline, p = token_losses(model, tokens), model(tokens.ids).logits[:, :-1].log_softmax(-1)
    disturb(model)
    found, q = divergence(model, tokens, baseline), model(tokens.ids).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert kl.mean() > 1e-5
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.nll, token_losses(model, tokens).nll)
    assert (found.agree == (p.argmax(-1) == q.argmax(-1))).float().mean() > 0.99


def test_divergence_does_not_depend_on_the_chunk(monkeypatch):
    model, tokens = tiny_model("llama"), windows()
    baseline = token_losses(model, tokens)
    disturb(model)
    whole = divergence(model, tokens, baseline)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 5 * 64)
    parts = divergence(model, tokens, baseline)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts.agree, whole.agree)


def test_kl_is_of_the_first_from_the_second():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert token_kl(p.log(), q.log()).item() == pytest.approx(0.5108256, rel=1e-5)
    assert token_kl(q.log(), p.log()).item() == pytest.approx(0.3680642, rel=1e-5)


def test_small_divergences_are_not_lost_in_rounding():
    torch.manual_seed(0)
    logits = torch.randn(200, 5000, dtype=torch.float64) * 3
    moved = logits + 1e-3 * torch.randn_like(logits)
    exact = token_kl(logits.log_softmax(-1), moved.log_softmax(-1)).mean()
    single = token_kl(logits.float().log_softmax(-1), moved.float().log_softmax(-1)).mean()
    assert exact < 1e-6
    assert single.item() == pytest.approx(exact.item(), abs=2e-8)


def test_another_head_is_refused():
    model, tokens = tiny_model("llama"), windows()
    baseline = token_losses(model, tokens)
    model.lm_head.weight.mul_(1.001)
    with pytest.raises(ValueError, match="output layer"):
        divergence(model, tokens, baseline)


def test_a_broken_quantized_model_is_refused():
    model, tokens = tiny_model("llama"), windows()
    baseline = token_losses(model, tokens)
    model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="window 0, token 0"):
        divergence(model, tokens, baseline)


def test_a_rounded_output_layer_is_compared_with_the_full_precision_one():
    from gptq_awq.evaluation.evaluate import full_precision, score

    model = tiny_model("llama")
    tokens = make_token_set("text", tiny_tokens(2, 16), None, "test")
    baseline = full_precision(model, None, "", [tokens], keep_output=True)
    with torch.no_grad():
        expected = model(input_ids=tokens.ids).logits[:, :-1].log_softmax(-1)
        model.get_output_embeddings().weight.mul_(1.1)
        found = model(input_ids=tokens.ids).logits[:, :-1].log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert score(model, None, baseline).metrics["text/kl"] == pytest.approx(float(kl), rel=1e-3)
