"""Laws of experts beside full precision: the tokens that the quantized router chose, as full precision has them."""

from dataclasses import replace

import pytest
import torch
from helpers.mixtures import KEEP, codes, entering, run
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import MIXTURES, tiny_model
from helpers.watching_solvers import Keep, Watching

from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.models.experts import fuse
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.gptq import GPTQ

ROUTE = ExpertPolicy("route", 10**6)


def seen_by(solver, name, experts):
    """Moments of every linear, by its name, and the model, its experts fused again."""
    model = tiny_model(name)
    result = run(model, Method("m", solver, {}), experts=experts)
    fuse(model)
    return dict(zip([row["name"] for row in result.ledger], solver.seen, strict=True)), model


@pytest.mark.parametrize("policy", [KEEP, ROUTE], ids=["keep", "route"])
@pytest.mark.parametrize("name", MIXTURES)
def test_while_nothing_is_quantized_the_two_are_the_same(name, policy):
    """C = H at every site of every expert, as in a dense model."""
    seen, _ = seen_by(Keep([]), name, policy)
    experts = [moments for linear, moments in seen.items() if ".experts." in linear and moments.tokens]
    assert experts
    for moments in experts:
        torch.testing.assert_close(moments.cross, moments.hessian, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_a_quantized_experts_tokens_are_paired_with_the_same_tokens_of_full_precision(name):
    full = tiny_model(name)
    seen, quantized = seen_by(Watching(GPTQ(), []), name, KEEP)
    ids = tokens().ids
    (now, index), (then, elsewhere) = entering(quantized, ids), entering(full, ids)
    assert not torch.equal(index, elsewhere)  # some tokens went to other experts in full precision
    own, whole = (m.model.layers[-1].mlp.experts for m in (quantized, full))
    prefix = f"model.layers.{len(full.model.layers) - 1}.mlp.experts"
    checked = 0
    for expert in range(len(whole.gate_up_proj)):
        rows = (index == expert).any(-1)
        if not rows.any():
            continue
        x, y = now[rows], then[rows]
        pairs = {"gate_up_proj": (x, y), "down_proj": (inner(own, expert, x), inner(whole, expert, y))}
        for linear, (a, b) in pairs.items():
            moments = seen[f"{prefix}.{linear}.{expert}"]
            expected = a.T @ b / len(a)
            torch.testing.assert_close(moments.cross, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            checked += 1
    assert checked >= 4


def inner(experts, expert, x):
    """An expert's hidden activations, computed as its paper has them."""
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("method", ["qronos", "gptaq"])
def test_holding_activations_or_computing_them_anew_gives_the_same_codes(method):
    kept, anew = (run("qwen3-moe", method, settings=replace(SMALL, activations=a)) for a in ("keep", "recompute"))
    assert codes(kept) == codes(anew)
