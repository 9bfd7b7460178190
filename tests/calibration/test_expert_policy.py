"""What calibrates experts that few tokens reach, and experts that are modules of their own."""

import copy

import pytest
import torch
from helpers.mixtures import KEEP, codes, entering, lonely, run
from helpers.quantization_runs import SMALL
from helpers.tiny_models import tiny_model, tiny_tokens
from torch import nn
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from gptq_awq.api import observe_moments
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.errors import UserError
from gptq_awq.grids.integer import IntGrid

# ----------------------------------------------------------------------------------------------- few tokens: the policy


def by_name(result, block, part):
    rows = [row for row in result.ledger if row["block"] == block and "expert" in row]
    return {row["expert"]: row for row in rows if part in row["name"]}


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss"])
def test_all_tokens_go_through_an_expert_that_none_reaches(name):
    model, ids = lonely(name), tiny_tokens(6, 32)
    hidden, index = entering(model, ids)
    assert not (index == 0).any()
    experts = copy.deepcopy(model.model.layers[-1].mlp.experts)
    W = experts.gate_up_proj[0]
    if name == "gpt-oss":
        inner = experts._apply_gate(hidden @ W + experts.gate_up_proj_bias[0])
    else:
        gate, up = functional.linear(hidden, W).chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
    last = len(model.model.layers) - 1
    seen = [s for s in observe_moments(model, ids, settings=SMALL) if s.block == last and s.site.expert == 0]
    for site, X in zip(seen, (hidden, inner), strict=True):
        assert (site.moments.routed, site.moments.tokens, site.moments.policy) == (0, 192, "route")
        expected = X.T @ X / len(X)
        assert (site.moments.hessian - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", ["gptq", "awq", "awq_gptq"])
@pytest.mark.parametrize(
    ("policy", "gate_up", "down"),
    [("route", "route", "route"), ("shared", "shared", "rtn"), ("rtn", "rtn", "rtn"), ("keep", "rtn", "rtn")],
)
def test_the_ledger_says_what_calibrated_an_expert_that_no_token_reaches(method, policy, gate_up, down):
    result = run(lonely("deepseek-v3"), method, experts=ExpertPolicy(policy, 1))
    for part, done in (("gate_up", gate_up), ("experts.down", down)):
        row = by_name(result, 2, part)[0]
        assert (row["tokens"], row["experts"]) == (0, done)
        assert row["calibrated_on"] == (0 if done == "rtn" else 192)
        assert (row["solver"] == "rtn") == (done == "rtn" or method == "awq")
        if done == "rtn":
            assert "error_after" not in row
            if method != "gptq":
                assert row["transforms"]["awq"]["skipped"] == "no calibration token reaches this expert"
    assert all(row["experts"] is None for e, row in by_name(result, 2, "gate_up").items() if row["tokens"])


@pytest.mark.parametrize("policy", ["rtn", "keep"])
def test_an_expert_that_no_token_reaches_is_rounded_without_a_search_that_needs_tokens(policy):
    searching = IntGrid(3, 16, search="hessian")
    result = run(lonely("deepseek-v3"), "gptq", grid=searching, experts=ExpertPolicy(policy, 1))
    plain = run(lonely("deepseek-v3"), "rtn")
    name = by_name(result, 2, "gate_up")[0]["name"]
    assert torch.equal(result.weights[name].codes, plain.weights[name].codes)
    assert all(weight.grid == searching for weight in result.weights.values())


def test_experts_that_read_something_else_are_not_made_up_for_and_keep_their_own_tokens(caplog):
    class Doubled(MixtralExperts):
        def forward(self, x, *rest):
            return super().forward(2 * x, *rest)

    def doubled():
        model = tiny_model("mixtral")
        for layer in model.model.layers:
            layer.mlp.experts.__class__ = Doubled
        return model

    assert run(doubled(), "gptq", experts=ExpertPolicy("route", 1)).ledger
    result = run(doubled(), "gptq", experts=ExpertPolicy("route", 10**6))
    rows = [row for row in result.ledger if "expert" in row]
    assert rows
    assert {row["experts"] for row in rows} <= {"keep", "rtn"}
    assert "do not read rows of what enters it" in caplog.text
    assert "so they keep the moments of the tokens that reach them" in caplog.text


def test_an_expert_with_few_tokens_keeps_them_where_that_is_the_policy():
    result = run("qwen3-moe", "gptq", experts=ExpertPolicy("keep", 10**6))
    rows = [row for row in result.ledger if "expert" in row and row["tokens"]]
    assert all(row["experts"] == "keep" and row["calibrated_on"] == row["tokens"] for row in rows)
    assert codes(result) == codes(run("qwen3-moe", "gptq"))


@pytest.mark.parametrize("options", [("some", 1), ("route", -1), ("route", "many")])
def test_an_unknown_policy_is_said(options):
    with pytest.raises(UserError, match=r"ExpertPolicy\.(policy|min_tokens)="):
        ExpertPolicy(*options)


# -------------------------------------------------------------------------------- experts that are modules of their own


class Expert(nn.Module):
    """As models had them before transformers 5."""

    def __init__(self, w1, w2, w3):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*reversed(w.shape), bias=False) for w in (w1, w2, w3))
        for linear, weight in zip((self.w1, self.w2, self.w3), (w1, w2, w3), strict=True):
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class ModuleMixture(nn.Module):
    """Mixtral's block of experts, as it was before transformers 5."""

    def __init__(self, fused):
        super().__init__()
        halves = [w.chunk(2) for w in fused.experts.gate_up_proj]
        self.gate = nn.Linear(64, 4, bias=False)
        self.gate.weight = fused.gate.weight
        parts = zip(halves, fused.experts.down_proj, strict=True)
        self.experts = nn.ModuleList(Expert(w1, w2, w3) for (w1, w3), w2 in parts)

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).float().softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out.view_as(hidden)


def mixture_of_modules():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp = ModuleMixture(layer.mlp)
    return model


@pytest.mark.parametrize("experts", [KEEP, ExpertPolicy("route", 100), ExpertPolicy("shared", 100)], ids=str)
def test_experts_that_are_modules_land_where_fused_ones_do(experts):
    ids = tiny_tokens()
    assert torch.allclose(mixture_of_modules()(ids).logits, tiny_model("mixtral")(ids).logits, rtol=1e-3, atol=1e-4)
    modules = run(mixture_of_modules(), "gptq", experts=experts)
    fused = run("mixtral", "gptq", experts=experts)
    assert not any("gate" in name.split(".") for name in modules.weights)
    for e, row in by_name(modules, 0, "w2").items():
        same = by_name(fused, 0, "down_proj")[e]
        assert (row["tokens"], row["experts"], row["calibrated_on"]) == (
            *(same["tokens"], same["experts"], same["calibrated_on"]),
        )
        parts = [modules.weights[f"model.layers.0.mlp.experts.{e}.{w}"].codes for w in ("w1", "w3")]
        whole = fused.weights[f"model.layers.0.mlp.experts.gate_up_proj.{e}"].codes
        assert (torch.cat(parts) == whole).float().mean() > 0.97
