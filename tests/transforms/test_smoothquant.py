"""SmoothQuant: function-preserving scales that share a channel's range between activations and weights."""

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.api import load_method, observe_moments
from gptq_awq.errors import UserError
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import matrix
from gptq_awq.models.topology import relative_error
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.smoothquant import SmoothQuant, smoothing


def seen(model):
    return list(observe_moments(model, tokens(), absorbers=True, settings=SMALL))


def smooth(model, smoothquant=SmoothQuant()):  # noqa: B008 (frozen)
    """Apply the transform to every block, without rounding."""
    _, blocks = find_blocks(model)
    sites = seen(model)
    for index, block in enumerate(blocks):
        own = [each for each in sites if each.block == index]
        yield from zip(
            own, smoothquant.apply(block, [e.site for e in own], [e.moments for e in own], {}, None), strict=True
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sites", ["norms", "all"])
def test_smoothing_leaves_the_logits_unchanged(name, sites):
    model = tiny_model(name)
    before = model(tiny_tokens()).logits
    scaled = [scaling.scales is not None for _, scaling in smooth(model, SmoothQuant(sites=sites))]
    assert any(scaled) or (name, sites) == ("opt-post-norm", "norms")  # whose norms write the residual stream
    assert relative_error(model(tiny_tokens()).logits, before) < 1e-4


def test_at_one_half_activations_and_weights_have_the_same_range():
    model = tiny_model("llama")
    own = {each.linears: scaling for each, scaling in smooth(model)}
    for each in seen(model):
        if own[each.linears].scales is None:
            continue
        largest = torch.stack([matrix(model.get_submodule(name)).abs().amax(0) for name in each.linears]).amax(0)
        torch.testing.assert_close(largest, each.moments.max_abs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_level_one_side(alpha):
    x, w = torch.rand(9) + 0.1, torch.rand(9) + 0.1
    s = smoothing(x, w, alpha)
    torch.testing.assert_close(x / s if alpha else w * s, torch.ones(9))


def test_only_sites_after_norms_are_scaled_unless_all_are_asked_for():
    model = tiny_model("llama")
    for each, scaling in smooth(model):
        first = each.site.linears[0]
        assert (scaling.scales is not None) == (first.endswith(("q_proj", "gate_proj"))), first
    assert all(scaling.scales is not None for _, scaling in smooth(tiny_model("llama"), SmoothQuant(sites="all")))


@pytest.mark.parametrize("preset", ["smoothquant", "smoothquant_gptq"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_presets_run_on_every_architecture(name, preset):
    result = quantize_model(tiny_model(name), tiny_tokens(), preset, bits=4, group_size=24, settings=SMALL)
    assert torch.isfinite(result.model(tiny_tokens()).logits).all()
    assert any("alpha" in row["transforms"]["smoothquant"] for row in result.ledger)


def test_it_composes_with_awq():
    transforms = {"smoothquant": SmoothQuant()} | load_method("awq")[0].transforms
    model = tiny_model("llama")
    result = quantize_model(
        model, tokens(), Method("both", RTN(), transforms, error_propagation=False), grid=IntGrid(8, 32), settings=SMALL
    )
    expected = tiny_model("llama")(tiny_tokens()).logits
    assert relative_error(result.model(tiny_tokens()).logits, expected) < 0.03


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match=r"SmoothQuant\.alpha=2"):
        SmoothQuant(alpha=2)
    with pytest.raises(UserError, match=r"SmoothQuant\.sites=some: give one of norms, all"):
        SmoothQuant(sites="some")
