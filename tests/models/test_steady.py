"""Laws of weights that forwards change: what is rounded is what files hold, and a reader computes the same with it."""

import copy

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, RwkvConfig

from gptq_awq import quantize_model
from gptq_awq.calibration.chain import why_not_alone
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.models.left import mark_left
from gptq_awq.models.linear import NOT_PASSED

IDS = torch.arange(24, dtype=torch.int64).view(2, 12)


def rwkv():
    """A model that halves weights of its second block, and quarters those of the third, at its first call."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=32, context_length=64, hidden_size=32, num_hidden_layers=3, rescale_every=1)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("called_before", [False, True])
def test_a_reader_of_rwkvs_rounded_weights_computes_what_was_scored(called_before):
    model = rwkv()
    full = weights(model)
    logits = rwkv()(IDS).logits
    if called_before:
        model(IDS)
    done = quantize_model(model, IDS, method="rtn", bits=8, group_size=8)
    for name, weight in done.weights.items():
        assert torch.allclose(weight.dequantize(), full[f"{name}.weight"], atol=0.01)
    assert torch.allclose(model(IDS).logits, logits, atol=0.1)
    reader = AutoModelForCausalLM.from_config(model.config).eval()
    reader.load_state_dict(weights(model))
    assert torch.equal(reader(IDS).logits, model(IDS).logits)


def test_a_forward_that_changes_its_weights_is_refused():
    model = tiny_model("llama")

    def halve(norm, _):
        norm.weight.mul_(0.5)

    model.get_submodule("model.norm").register_forward_pre_hook(halve)
    with pytest.raises(UserError, match=r"changes its own weights \(model\.norm\.weight\)"):
        quantize_model(model, IDS, method="rtn", bits=8, group_size=8)


@pytest.mark.parametrize("change", [None, "weight", "module", "mark"])
def test_what_a_forward_tells_is_asked_again_only_of_a_changed_model(change):
    model, tokens = tiny_model("llama"), make_token_set("calibration", tiny_tokens(), None, "test")
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    mark_left(model, calibrates=True)
    assert why_not_alone(model, tokens) is None
    asked, linear = len(forwards), model.model.layers[0].mlp.down_proj
    if change == "weight":
        with torch.no_grad():
            linear.weight.mul_(2)
    elif change == "module":
        model.model.layers[0].mlp.down_proj = copy.deepcopy(linear)
    elif change == "mark":
        linear.left = NOT_PASSED
    mark_left(model, calibrates=True)
    assert why_not_alone(model, tokens) is None
    assert len(forwards) == asked if change is None else len(forwards) > asked
    assert not hasattr(model.model.layers[0].mlp.down_proj, "left")
