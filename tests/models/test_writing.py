"""Laws of what writing text computes with: attention of one new token, and a cache in reserved memory."""

from typing import Any

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.tiny_models import tiny_model, tiny_tokens
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GenerationConfig

from gptq_awq.models.attention import writing_attention
from gptq_awq.models.reserved_cache import reserved_cache


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "shared"), [(4, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_one_new_token_attends_as_it_does_in_torch(dtype, queries, shared, mask, scale):
    q, k, v = normal(2, queries, 1, 16), normal(2, shared, 23, 16, seed=1), normal(2, shared, 23, 8, seed=2)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": True, "dropout_p": 0.0}
    if mask:
        allowed = normal(2, 1, 1, 23, seed=3) > 0
        options["attn_mask"] = allowed if mask == "bool" else torch.where(allowed, 0.0, -torch.inf).to(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    expected = scaled_dot_product_attention(q, k, v, **options)
    with writing_attention():
        found = scaled_dot_product_attention(q, k, v, **options)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


def test_keys_and_values_are_read_where_they_lie():
    q, keys, values = normal(3, 6, 1, 16), normal(3, 40, 2, 16, seed=1).transpose(1, 2), normal(3, 2, 40, 8, seed=2)
    k, v = keys[:, :, 5:28], values[:, :, 5:28]
    with writing_attention():
        found = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert torch.equal(found, scaled_dot_product_attention(q, k.contiguous(), v.contiguous(), enable_gqa=True))
    assert torch.allclose(found, scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=1e-6)


@pytest.mark.parametrize("other", ["two tokens", "dropout", "causal"])
def test_other_attention_is_torchs(other):
    x = normal(1, 2, 2 if other == "two tokens" else 1, 8)
    keys = normal(1, 2, 5, 8, seed=1)
    options = {"dropout_p": 0.5 if other == "dropout" else 0.0, "is_causal": other == "causal"}
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(x, keys, keys, **options)
    torch.manual_seed(0)
    with writing_attention():
        assert torch.equal(scaled_dot_product_attention(x, keys, keys, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_reserved_cache_holds_what_transformers_holds(name):
    model = tiny_architecture(name)
    ids = tiny_tokens(3, 12)
    found = reserved_cache(model, 12)
    expected = DynamicCache(config=model.config)
    assert found is not None
    assert any(type(layer) is not type(own) for layer, own in zip(found.layers, expected.layers, strict=True))
    for part in (ids[:, :7], *ids[:, 7:].split(1, 1)):
        ours, theirs = (model(part, past_key_values=cache, use_cache=True).logits for cache in (found, expected))
        assert torch.equal(ours, theirs)
    for layer, own in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(layer.keys, own.keys)
        assert torch.equal(layer.values, own.values)


def test_text_longer_than_was_reserved_goes_on_as_in_transformers():
    model, ids = tiny_model("llama"), tiny_tokens(2, 12)
    logits = [
        model(ids[:, 8:], past_key_values=cache).logits
        for cache in (reserved_cache(model, 9), DynamicCache(config=model.config))
        if model(ids[:, :8], past_key_values=cache) is not None
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "xlnet"])
def test_models_with_other_caches_bring_their_own(name):
    assert reserved_cache(tiny_architecture(name), 12) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "jamba", "falcon_h1", "lfm2", "mamba"])
def test_models_write_the_same_with_it(name):
    model, ids = tiny_architecture(name), tiny_tokens(3, 6)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=0)
    seen, cache = torch.ones_like(ids), reserved_cache(model, 26)
    expected = model.generate(ids, attention_mask=seen, generation_config=greedy)
    with writing_attention():
        given = {} if cache is None else {"past_key_values": cache}
        assert torch.equal(model.generate(ids, attention_mask=seen, generation_config=greedy, **given), expected)
