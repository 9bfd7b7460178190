"""Shapes of models met in practice: laws of 8 bits and of moments for each; clear words for those that can't be."""

import pytest
import torch
import transformers as T  # noqa: N812
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import COMMON, GROUPED, SPECIAL, tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.api import observe_moments
from gptq_awq.calibration.activations import open_activations
from gptq_awq.calibration.sequential import staged_forward
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear
from gptq_awq.models.topology import relative_error
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.rtn import RTN

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
ALIBI = {"vocab_size": 64, "n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": 128, "expansion_ratio": 2}
SHAPES = {
    "llama, one key-value head": lambda: T.LlamaConfig(**COMMON, num_key_value_heads=1),
    "falcon, one key-value head": lambda: T.FalconConfig(**COMMON, multi_query=True, new_decoder_architecture=False),
    "gpt-bigcode, one key-value head": lambda: T.GPTBigCodeConfig(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=128, **SPECIAL
    ),
    "mistral, sliding window": lambda: T.MistralConfig(**GROUPED, sliding_window=8),
    "gemma2, every other window": lambda: T.Gemma2Config(**GROUPED, head_dim=16, **ALTERNATING),
    "gemma3, a rope for each kind": lambda: T.Gemma3TextConfig(**GROUPED, head_dim=16, **ALTERNATING),
    "gemma4, inputs for each layer": lambda: T.Gemma4TextConfig(**GROUPED, head_dim=16, **ALTERNATING),
    "cohere2, parallel": lambda: T.Cohere2Config(**GROUPED, **ALTERNATING),
    "smollm3, layers without rope": lambda: T.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "mpt, alibi": lambda: T.MptConfig(**ALIBI, **SPECIAL),
    "bloom, alibi": lambda: T.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4, **SPECIAL),
    "deepseek, latent attention": lambda: T.DeepseekV2Config(
        **COMMON,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "lfm2, convolutions": lambda: T.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3.5, linear attention": lambda: T.Qwen3_5TextConfig(
        **GROUPED,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}


def shaped(config):
    """A random model of a config, the same one at each call."""
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of_linears(model, ids):
    """What enters every linear of the blocks in one forward of the whole model, by one hook each."""
    prefix, blocks = find_blocks(model)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, key=f"{prefix}.{name}": seen.update({key: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name, module in blocks.named_modules()
        if is_linear(module)
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def same_moments(hessian, X):
    return relative_error(hessian, X.T @ X / len(X)) < 1e-5


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", SHAPES)
def test_8_bits_of_all_linears_change_the_logits_little(name, method):
    model = shaped(SHAPES[name]())
    expected = model(tiny_tokens()).logits
    done = quantize_model(model, tokens(), method, bits=8, group_size=16, settings=SMALL)
    _, blocks = find_blocks(model)
    assert len(done.weights) == sum(is_linear(module) for module in blocks.modules())
    assert relative_error(model(tiny_tokens()).logits, expected) < 0.06


@pytest.mark.parametrize("name", SHAPES)
def test_observed_moments_are_those_that_hooks_see_in_the_whole_model(name):
    model, ids = shaped(SHAPES[name]()), tiny_tokens(4)
    seen = inputs_of_linears(model, ids)
    for site in observe_moments(model, ids):
        for linear in site.linears:
            assert same_moments(site.moments.hessian, seen.pop(linear)), linear
    assert not seen


@pytest.mark.parametrize("name", SHAPES)
def test_staged_moments_are_those_that_hooks_see_in_the_whole_model(name):
    model, data = shaped(SHAPES[name]()), tokens(4)
    seen = inputs_of_linears(model, data.ids)
    prefix, blocks = find_blocks(model)
    sites = [[site for site in observe_moments(model, data.ids) if site.block == i] for i in range(len(blocks))]
    activations = open_activations(model, blocks, data, 64, torch.float32)
    for index, block in enumerate(blocks):

        def check(site, moments, index=index):
            for linear in site.linears:
                assert same_moments(moments.hessian, seen.pop(f"{prefix}.{index}.{linear}")), linear

        staged_forward(block, index, [each.site for each in sites[index]], activations, check)
    assert not seen


def test_weights_that_blocks_share_are_rounded_once():
    config = T.Zamba2Config(
        **COMMON | {"num_hidden_layers": 4},
        num_mem_blocks=1,
        hybrid_layer_ids=[1, 3],
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=8,
    )
    model = shaped(config)
    shared = model.model.layers[1].shared_transformer.self_attn.q_proj
    assert model.model.layers[3].shared_transformer.self_attn.q_proj.weight is shared.weight
    result = quantize_model(model, tokens(), "gptq", group_size=16)
    names = [name for name in result.weights if name.endswith("shared_transformer.self_attn.q_proj")]
    assert names == ["model.layers.1.shared_transformer.self_attn.q_proj"]
    assert torch.equal(shared.weight, result.weights[names[0]].dequantize())


def test_linears_that_are_never_called_are_left_and_named():
    config = T.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=16)
    model = shaped(config)
    before = model.backbone.layers[0].mixer.dt_proj.weight.clone()
    result = quantize_model(model, tokens(), "gptq", group_size=16)
    left = {row["name"]: row["left"] for row in result.ledger if "left" in row}
    assert left == {f"backbone.layers.{i}.mixer.dt_proj": "no calibration token passes it" for i in range(2)}
    assert torch.equal(model.backbone.layers[0].mixer.dt_proj.weight, before)
    rounded = quantize_model(model, None, Method("rtn", RTN()), group_size=16)
    assert "backbone.layers.0.mixer.dt_proj" in rounded.weights  # without data there is nothing to miss
