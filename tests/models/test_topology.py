"""Topology by observation, on architectures that nobody described to it."""

import copy

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens
from torch import nn

from gptq_awq.models.blocks import BlockCalls, Call, find_blocks
from gptq_awq.models.linear import is_linear
from gptq_awq.models.topology import absorb, observe_sites, relative_error
from gptq_awq.models.unfuse import unfuse


def sites_of(model, index=0):
    _, blocks = find_blocks(model)
    hidden, calls = BlockCalls(model, blocks).record(tiny_tokens(1, 16))
    return observe_sites(blocks[index], hidden, calls[index], absorbers=True, heads=4)


# site → absorber, as a person who knows the architecture would write it.
LLAMA = {
    "self_attn.q_proj+k_proj+v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj+up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA | {"mlp.gate_proj+up_proj": "pre_feedforward_layernorm"},
    "opt": {
        "self_attn.q_proj+k_proj+v_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",
    },
    # The norm's output is also the residual: scaling it would change the function.
    "opt-post-norm": {
        "self_attn.q_proj+k_proj+v_proj": None,
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": None,
        "fc2": "fc1",
    },
    # GELU is not homogeneous: nothing absorbs a scale after it.
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2", "mlp.c_proj": None},
    "gpt-neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": "attention.query_key_value",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
        "mlp.dense_4h_to_h": None,
    },
    "phi3": {
        "self_attn.qkv_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.qkv_proj",
        "mlp.gate_up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.gate_up_proj",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_and_absorbers_are_those_a_person_would_name(name):
    sites = sites_of(tiny_model(name), index=1)
    assert {site.name: site.absorber and site.absorber.producer for site in sites} == EXPECTED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_of_a_block_is_in_exactly_one_site(name):
    model = tiny_model(name)
    _, blocks = find_blocks(model)
    linears = [n for n, m in blocks[0].named_modules() if is_linear(m)]
    assert sorted(n for site in sites_of(model) for n in site.linears) == sorted(linears)


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_scales_leave_the_logits_unchanged(name):
    model, tokens = tiny_model(name), tiny_tokens()
    before = model(tokens).logits
    _, blocks = find_blocks(model)
    sites = [sites_of(model, i) for i in range(len(blocks))]
    moved = 0
    for block, found in zip(blocks, sites, strict=True):
        for site in found:
            if site.absorber:
                s = site.absorber.tie(torch.rand(site.width) * 2 + 0.25)
                absorb(block, site, site.absorber, s)
                moved += 1
    assert moved
    assert relative_error(model(tokens).logits, before) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_observing_leaves_the_model_as_it_was(name):
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    forwards = [m.forward for m in model.modules()]
    sites_of(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [m.forward for m in model.modules()] == forwards


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_run_one_by_one_are_the_model(name):
    model, tokens = tiny_model(name), tiny_tokens()
    _, blocks = find_blocks(model)
    hidden, calls = BlockCalls(model, blocks).record(tokens)
    expected = {}
    handle = blocks[-1].register_forward_hook(lambda _m, _a, out: expected.update(out=out))
    model(tokens, use_cache=False)
    handle.remove()
    for block, call in zip(blocks, calls, strict=True):
        hidden = call.run(block, hidden)
    out = expected["out"]
    assert torch.allclose(hidden, out[0] if isinstance(out, tuple) else out, atol=1e-5)


def test_grouped_query_heads_share_their_scale():
    site = next(s for s in sites_of(tiny_model("llama")) if s.name == "self_attn.o_proj")
    assert site.absorber is not None
    tied = site.absorber.tie(torch.arange(1.0, 65.0)).view(4, 16)
    assert torch.equal(tied[0], tied[1])
    assert torch.equal(tied[2], tied[3])
    assert not torch.equal(tied[0], tied[2])


def test_gemma_norms_are_seen_to_multiply_by_one_plus_their_weight():
    absorbers = [s.absorber for s in sites_of(tiny_model("gemma3")) if "norm" in s.absorber.producer]
    assert absorbers
    assert all(a.unit_offset for a in absorbers)


class Leaky(nn.Module):
    """An MLP whose norm also feeds the output directly; `gain` of the residual."""

    def __init__(self, residual=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.residual = residual

    def forward(self, x):
        y = self.norm(x)
        return self.residual * x + y + self.down(torch.relu(self.up(y)))


# (gain of the residual, size of the first token, size of the others)
LOUD = {"no residual": (0.0, 1, 1), "one massive token": (1.0, 1e6, 1), "a large residual": (1.0, 1e4, 1e4)}


@pytest.mark.parametrize("loud", LOUD)
def test_a_channel_that_someone_else_reads_is_not_absorbed(loud):
    torch.manual_seed(0)
    residual, first, others = LOUD[loud]
    hidden = others * torch.randn(1, 8, 16)
    hidden[:, 0] *= first / others
    up, down = observe_sites(Leaky(residual), hidden, Call(), absorbers=True)
    assert up.absorber is None
    assert down.absorber is not None
    assert down.absorber.producer == "up"


def test_a_router_that_reads_a_norm_keeps_its_scales_out_of_it_beside_a_massive_activation():
    torch.manual_seed(0)
    config = T.Qwen2MoeConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_experts": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        shared_expert_intermediate_size=64,
    )
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.get_input_embeddings().weight[1] = 1e5
    unfuse(model)
    _, blocks = find_blocks(model)
    ids = tiny_tokens(1, 16)
    ids[:, 0] = 1
    hidden, calls = BlockCalls(model, blocks).record(ids)
    found = {site.name: site.absorber for site in observe_sites(blocks[0], hidden, calls[0], absorbers=True)}
    assert found["mlp.shared_expert.gate_proj+up_proj"] is None
    right = {
        "self_attn.q_proj+k_proj+v_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.shared_expert.down_proj": "mlp.shared_expert.up_proj",
    }
    assert {name: found[name].producer for name in right} == right
