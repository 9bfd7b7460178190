"""Laws of the attention that calibration computes with."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gptq_awq.kernels import attention, rank_k
from gptq_awq.models.attention import faster_attention_of

pytestmark = pytest.mark.skipif(not rank_k.available(), reason="this CPU has no bfloat16 dot product (AVX512-BF16)")
BLOCK = nn.Linear(2, 2, dtype=torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """The number of calls that the kernel got."""
    seen, kernel = [], attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *args: (seen.append(1), kernel(*args)))
    return seen


def heads(batch, count, tokens, width, seed=0, dtype=torch.bfloat16):
    x = torch.randn(batch, tokens, count, width, generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2).to(dtype)  # as models have them: not contiguous


@pytest.mark.parametrize(("queries", "shared"), [(1, 1), (4, 2), (9, 3)])
@pytest.mark.parametrize(("tokens", "width"), [(32, 64), (49, 2), (100, 16), (333, 96)])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_kernel_is_as_near_to_float64_as_torch(calls, queries, shared, tokens, width, scale):
    q, k, v = heads(2, queries, tokens, width), heads(2, shared, tokens, width, 1), heads(2, shared, tokens, width, 2)
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "enable_gqa": True}
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    theirs = scaled_dot_product_attention(q, k, v, **options)
    with faster_attention_of(BLOCK):
        ours = scaled_dot_product_attention(q, k, v, **options)
    assert len(calls) == 1
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error, their_error = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
    assert error < 1.5 * their_error + 1e-4


def test_extreme_scores_overflow_nothing_and_nan_stays(calls):
    q = heads(1, 2, 64, 16) * 1e4
    with faster_attention_of(BLOCK):
        out = scaled_dot_product_attention(q, q, q, is_causal=True)
        assert torch.isfinite(out).all()
        q[0, 1, 40] = torch.nan
        assert scaled_dot_product_attention(q, q, q, is_causal=True)[0, 1, 40:].isnan().all()
    assert len(calls) == 2


@pytest.mark.parametrize("other", ["float32", "mask", "cross", "short", "dropout", "full"])
def test_every_other_call_is_torchs(calls, other):
    x = heads(1, 2, 8 if other == "short" else 64, 16, dtype=torch.float32 if other == "float32" else torch.bfloat16)
    keys = heads(1, 2, 80, 16, 1) if other == "cross" else x
    options: dict[str, Any] = {"is_causal": other not in ("mask", "full")}
    if other == "mask":
        options["attn_mask"] = torch.ones(64, 64, dtype=torch.bool).tril()
    if other == "dropout":
        options["dropout_p"] = 0.5
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(x, keys, keys, **options)
    torch.manual_seed(0)
    with faster_attention_of(BLOCK):
        assert torch.equal(scaled_dot_product_attention(x, keys, keys, **options), expected)
    assert not calls


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_models_hidden_states_differ_by_no_more_than_bfloat16_does(calls, name):
    model, ids = tiny_model(name), tiny_tokens(2, 64)
    exact = model(ids, output_hidden_states=True).hidden_states[-1]
    half = model.bfloat16()
    plain = half(ids, output_hidden_states=True).hidden_states[-1]
    with faster_attention_of(half):
        ours = half(ids, output_hidden_states=True).hidden_states[-1]
    assert calls
    assert (ours - exact).norm() < 1.2 * (plain - exact).norm()
