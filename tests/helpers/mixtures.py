"""Quantizing tiny mixtures of experts."""

from gptq_awq import quantize_model
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.grids.integer import IntGrid
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import tiny_model

GRID = IntGrid(3, 16)
KEEP = ExpertPolicy("keep", 0)


def lonely(name):
    """A mixture whose expert 0 no token reaches, in its last block."""
    model = tiny_model(name)
    mlp = model.model.layers[-1].mlp
    bias = mlp.router.bias if name == "gpt-oss" else mlp.gate.e_score_correction_bias
    bias[0] = -1e3
    return model


def run(model, method, grid=GRID, data=None, settings=SMALL, experts=KEEP):
    """Quantize a mixture, given or by its name in MIXTURES."""
    model = tiny_model(model) if isinstance(model, str) else model
    return quantize_model(model, data or tokens(), method, grid=grid, settings=settings, experts=experts)


def codes(result):
    """Hash of every linear's codes, by name."""
    return {name: weight.sha256() for name, weight in result.weights.items()}


def entering(model, ids):
    """Inputs of the experts of the last block: hidden states, and indices of experts."""
    seen = []
    experts = model.model.layers[-1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    model(ids, use_cache=False)
    hook.remove()
    hidden, index, _ = seen[0]
    return hidden, index
