"""Laws of mixtures of experts: fused experts as linears, their sites, what calibrates those that few tokens reach."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from quantized_weights import NoTokenizer
from tiny_models import MIXTURES, tiny_model, tiny_tokens
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from transformers import AutoModelForCausalLM, Llama4TextConfig

from gptq_awq import quantize_model
from gptq_awq.api import load_method, observe_moments
from gptq_awq.data import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.export.base import Source, linear_specs
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.write import Exports
from gptq_awq.grids.integer import IntGrid
from gptq_awq.journal import Journal
from gptq_awq.models.blocks import BlockCalls, find_blocks
from gptq_awq.models.experts import Experts, experts_in, fuse, unfuse
from gptq_awq.models.linear import matrix
from gptq_awq.models.topology import observe_sites
from gptq_awq.moments import Moments
from gptq_awq.pipeline.experts import ExpertPolicy
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.observe import Record
from gptq_awq.pipeline.places import landing
from gptq_awq.pipeline.quantize import Settings, quantize
from gptq_awq.pipeline.staged import staged_forward
from gptq_awq.pipeline.streams import open_streams
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.tuning.rounding import LearnedRounding

SMALL = Settings(compute_dtype="float32", tokens_per_batch=64)
GRID = IntGrid(3, 16)
KEEP = ExpertPolicy("keep", 0)


def tokens(rows=6, length=32):
    return make_token_set("tiny", tiny_tokens(rows, length), None, "test")


def lonely(name):
    """A mixture whose expert 0 no token reaches, in its last block."""
    model = tiny_model(name)
    mlp = model.model.layers[-1].mlp
    bias = mlp.router.bias if name == "gpt-oss" else mlp.gate.e_score_correction_bias
    bias[0] = -1e3
    return model


def run(model, method, grid=GRID, data=None, settings=SMALL, experts=KEEP):
    model = tiny_model(model) if isinstance(model, str) else model
    return quantize_model(model, data or tokens(), method, grid=grid, settings=settings, experts=experts)


def codes(result):
    return {name: weight.sha256() for name, weight in result.weights.items()}


def entering(model, ids):
    """What the experts of the last block are called with: hidden states, and indices of experts."""
    seen = []
    experts = model.model.layers[-1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    model(ids, use_cache=False)
    hook.remove()
    hidden, index, _ = seen[0]
    return hidden, index


# ------------------------------------------------------------------------------------------ fused experts as linears


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_as_linears_give_the_same_logits_and_fuse_back(name):
    model = tiny_model(name)
    before, logits = copy.deepcopy(model.state_dict()), model(tiny_tokens()).logits
    unfuse(model)
    assert all(e.transposed == (name == "gpt-oss") for e in experts_in(model).values())
    assert len(experts_in(model)) == 4
    assert torch.allclose(model(tiny_tokens()).logits, logits, rtol=1e-4, atol=1e-5)
    fuse(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_the_linears_are_views_and_copies_are_not():
    model = tiny_model("gpt-oss")
    owner = model.model.layers[0].mlp.experts
    fused = owner.gate_up_proj.data
    unfuse(model)
    linears = owner.gate_up_proj
    assert linears.fused().data_ptr() == fused.data_ptr()
    copied = copy.deepcopy(linears)
    matrix(list(linears)[1]).mul_(2)
    assert torch.equal(linears.fused(), fused)
    assert torch.equal(2 * copied.fused()[1], fused[1])
    linears.take(torch.ones_like(fused))
    assert (next(iter(linears)).weight == 1).all()
    with pytest.raises(ValueError, match="shape"):
        linears.take(fused[:1])


def test_a_slice_that_is_used_in_another_way_is_told():
    experts = Experts(torch.randn(2, 4, 3), transposed=False)
    assert experts[torch.tensor(1)].linear is list(experts)[1]
    with pytest.raises(IndexError):
        experts[2]
    with pytest.raises(UserError, match="an expert's weight was seen in products of one kind, now it is in matmul"):
        torch.randn(5, 4) @ experts[0]


def test_experts_in_one_product_are_refused_by_name():
    config = Llama4TextConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    with pytest.raises(UserError, match=r"experts.gate_up_proj in bmm.*method=fp"):
        quantize_model(AutoModelForCausalLM.from_config(config).eval(), None, "rtn")


# --------------------------------------------------------------------------------------------------- sites and moments


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_the_probe_does_not_reach_have_sites_too(name):
    model = tiny_model(name)
    unfuse(model)
    _, blocks = find_blocks(model)
    hidden, calls = BlockCalls(model, blocks).record(tiny_tokens(1, 2))
    sites = observe_sites(blocks[-1], hidden, calls[-1], absorbers=True)
    count = len(blocks[-1].mlp.experts.down_proj)
    routed = [site for site in sites if site.expert is not None]
    assert [site.expert for site in routed] == [e for e in range(count) for _ in range(2)]
    absorbers = {site.absorber and site.absorber.producer.rpartition(".")[0] for site in routed[1::2]}
    assert absorbers == {None if name == "gpt-oss" else "mlp.experts.gate_up_proj"}  # gpt-oss adds 1 in between
    assert all(site.absorber is None for site in routed[::2])
    assert sum(not site.analogous and site.absorber is not None for site in routed) == (name != "gpt-oss")


@pytest.mark.parametrize("name", MIXTURES)
def test_moments_of_experts_are_those_of_the_tokens_routed_to_them(name):
    model, ids = tiny_model(name), tiny_tokens(6, 32)
    hidden, index = entering(model, ids)
    last = len(model.model.layers) - 1
    for seen in observe_moments(model, ids, settings=SMALL):
        if seen.block != last or seen.site.expert is None or "gate_up" not in seen.site.name:
            continue
        X = hidden[(index == seen.site.expert).any(1)]
        assert seen.moments.routed == len(X)
        if len(X) >= 128:
            assert torch.allclose(seen.moments.hessian, X.T @ X / len(X), rtol=1e-3, atol=1e-4)


def true_sequential_by_recomputation(model, ids, solver):
    """The plain reference: one whole forward of the quantized-so-far model for every site."""
    unfuse(model)
    _, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        hidden, calls = BlockCalls(model, blocks).record(ids[:1, :16])
        for site in observe_sites(block, hidden, calls[index], absorbers=False):
            inputs = [torch.empty(0, site.width)]
            hook = block.get_submodule(site.linears[0]).register_forward_pre_hook(
                lambda _m, args, inputs=inputs: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            model(ids, use_cache=False)
            hook.remove()
            X = torch.cat(inputs)
            stats = Moments(X.T @ X / len(X), X.abs().mean(0), len(X)) if len(X) else None
            for name in site.linears:
                W = matrix(block.get_submodule(name))
                W.copy_((solver if len(X) else RTN()).solve(W.clone(), stats, GRID).quantized.dequantize())
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_staged_experts_equal_true_sequential_by_recomputation(name):
    staged = run(name, Method("gptq", GPTQ())).model
    plain = true_sequential_by_recomputation(tiny_model(name), tokens().ids, GPTQ())
    for (key, ours), theirs in zip(staged.state_dict().items(), plain.state_dict().values(), strict=True):
        assert ((ours - theirs).abs() < 1e-5).float().mean() > 0.9, key  # a rare tie changes whole rows


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_recomputed_activations_give_the_same_codes_at_one_forward_for_all_experts(name):
    kept = run(name, Method("gptq", GPTQ()))
    model = tiny_model(name)
    forwards = []
    model.model.layers[-1].register_forward_pre_hook(lambda _m, _a: forwards.append(1))
    recomputed = run(model, Method("gptq", GPTQ()), settings=replace(SMALL, activations="recompute"))
    assert codes(kept) == codes(recomputed)
    ordinary = len({row["site"] for row in recomputed.ledger if row["block"] == 1 and "expert" not in row})
    batches, probes = 3, 6
    assert len(forwards) <= (ordinary + 3) * batches + probes


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_padding_changes_no_statistic_of_an_expert(name):
    ids = tiny_tokens(4, 24)
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.long)], dim=1)
    mask = torch.arange(32).expand(4, 32) < 24
    for policy in (KEEP, ExpertPolicy("route", 40)):
        plain = run(name, "gptq", data=make_token_set("plain", ids, None, "test"), experts=policy)
        masked = run(name, "gptq", data=make_token_set("padded", padded, mask, "test"), experts=policy)
        for ours, theirs in zip(masked.ledger, plain.ledger, strict=True):
            if ours["block"] == 0:  # later routing hangs on rounding errors
                assert (ours["tokens"], ours.get("experts")) == (theirs["tokens"], theirs.get("experts"))
                assert ours["error_after"] == pytest.approx(theirs["error_after"], rel=0.05)


def test_tokens_of_experts_add_up():
    for name in ("mixtral", "gpt-oss"):
        rows = [row for row in run(name, "gptq").ledger if "down_proj" in row["name"] and row["block"] == 0]
        assert sum(row["tokens"] for row in rows) == 2 * tokens().ids.numel()
        assert all(row["calibrated_on"] == row["tokens"] for row in rows)


def test_sites_in_another_order_are_refused_rather_than_their_tokens_lost():
    model = tiny_model("mixtral")
    unfuse(model)
    _, blocks = find_blocks(model)
    streams = open_streams(model, blocks, tokens(), 64, torch.float32)
    sites = observe_sites(blocks[0], streams.probe_input(), streams.probe.calls[0], absorbers=False)
    swapped = [*sites[:2], *reversed(sites[2:])]
    with pytest.raises(UserError, match="in another order"):
        staged_forward(blocks[0], 0, swapped, streams, lambda _site, _moments: None, policy=KEEP)


class IdentityGPTQ(GPTQ):
    """GPTQ that is told H = 1."""

    def solve(self, weight, moments, grid):
        n = weight.shape[1]
        return super().solve(weight, Moments(torch.eye(n), torch.ones(n), moments.tokens), grid)


@pytest.mark.parametrize("name", MIXTURES)
def test_gptq_with_identity_hessian_is_rtn_for_experts(name):
    assert codes(run(name, Method("gptq", IdentityGPTQ()))) == codes(run(name, Method("rtn", RTN())))


def test_routers_are_never_quantized():
    for name in MIXTURES:
        result = run(name, "rtn")
        before = tiny_model(name).model.layers[-1].mlp
        after = result.model.model.layers[-1].mlp
        router = "router" if name == "gpt-oss" else "gate"
        assert torch.equal(getattr(before, router).weight, getattr(after, router).weight)


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


def test_an_expert_with_few_tokens_keeps_them_where_that_is_the_policy():
    result = run("qwen3-moe", "gptq", experts=ExpertPolicy("keep", 10**6))
    rows = [row for row in result.ledger if "expert" in row and row["tokens"]]
    assert all(row["experts"] == "keep" and row["calibrated_on"] == row["tokens"] for row in rows)
    assert codes(result) == codes(run("qwen3-moe", "gptq"))


@pytest.mark.parametrize("options", [("some", 1), ("route", -1), ("route", "many")])
def test_an_unknown_policy_is_said(options):
    with pytest.raises(UserError, match=r"experts\.(policy|min_tokens)="):
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


# ----------------------------------------------------------------------------------- the rest of a run: resume, export


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, method, name):
    policy = ExpertPolicy("route", 90)
    plain = run(name, method, experts=policy)
    journal = Journal(tmp_path / "j", "key")
    attempt = partial(quantize, method=load_method(method)[0], grid=GRID, settings=SMALL, experts=policy)
    killed = attempt(tiny_model(name), tokens(), progress=journal)
    next(killed)
    killed.close()
    model, found = tiny_model(name), {}
    for block in attempt(model, tokens(), progress=journal):
        assert block.restored == (block.index == 0)
        found |= {key: weight.sha256() for key, weight in block.weights.items()}
    assert found == codes(plain)
    assert all(torch.equal(v, plain.model.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("policy", ["route", "rtn"])
def test_a_recorded_calibration_gives_the_same_codes(tmp_path, policy):
    experts = ExpertPolicy(policy, 60)
    plain = run(lonely("deepseek-v3"), "awq", experts=experts)
    for _ in range(2):  # makes the record, reads it
        record = Record(Journal(tmp_path / "record", "key"), 10**9)
        rows, found = [], {}
        for block in quantize(
            lonely("deepseek-v3"), tokens(), load_method("awq")[0], GRID, SMALL, record=record, experts=experts
        ):
            rows += block.rows
            found |= {key: weight.sha256() for key, weight in block.weights.items()}
        assert found == codes(plain)
        assert [row.get("experts") for row in rows] == [row.get("experts") for row in plain.ledger]


@pytest.mark.parametrize("name", MIXTURES)
def test_an_exported_mixture_loads_in_transformers_with_the_same_logits(name, tmp_path):
    result = run(name, "gptq")
    format_ = HFFormat("float32")
    format_.write(Source(result.model, NoTokenizer(), "tiny", result.weights), tmp_path)
    decoded = {each.name: each.weight for each in format_.decode(tmp_path)}
    assert decoded.keys() == result.weights.keys()
    assert all(torch.equal(decoded[key], weight.dequantize()) for key, weight in result.weights.items())
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny_tokens()).logits, result.model(tiny_tokens()).logits)


def test_a_fused_model_is_saved_as_transformers_saves_it(tmp_path):
    result = run("qwen3-moe", "rtn")
    logits = result.model(tiny_tokens()).logits
    fuse(result.model)
    result.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(model(tiny_tokens()).logits, logits, rtol=1e-4, atol=1e-5)


def test_other_formats_refuse_experts_before_calibration():
    model = tiny_model("mixtral")
    unfuse(model)
    specs = linear_specs(model, landing(model, GRID), True)
    with pytest.raises(UserError, match=r"export.formats=gptq: mixtures of experts"):
        Exports((GPTQFormat(),)).check(specs, model, NoTokenizer())
    Exports((HFFormat(),)).check(specs, model, NoTokenizer())


@pytest.mark.parametrize("method", ["gptaq", "qronos", "fast"])
def test_comparing_tokens_that_are_routed_differently_is_refused(method):
    with pytest.raises(UserError, match=r"mixtures of experts need a method without that, such as method=gptq"):
        run("mixtral", method)


def test_experts_roundings_are_learned_too():
    method = Method("gptq", GPTQ(), tuning={"rounding": LearnedRounding(epochs=2, tokens_per_step=64)})
    rows = run("mixtral", method).ledger
    details = [row["tuning"]["rounding"] for row in rows if "expert" in row]
    assert details[0]["error_last_pass"] < details[0]["error_first_pass"]


class Bystander(TorchFunctionMode):
    """A mode that does nothing, as the one of faster attention does nothing to linears."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_forwards_wait_inside_of_calls_that_a_mode_handles():
    plain = run("mixtral", "gptq")
    with Bystander(), Bystander():
        watched = run("mixtral", "gptq", settings=replace(SMALL, activations="recompute"))
        assert len(_get_current_function_mode_stack()) == 2
    assert codes(watched) == codes(plain)


def test_rotations_refuse_experts_by_name():
    with pytest.raises(UserError, match=r"method=quarot: does not rotate routers"):
        run("mixtral", "quarot")


def test_experts_are_calibrated_in_bfloat16_too():
    for name in ("mixtral", "gpt-oss"):
        rows = run(name, "gptq", settings=Settings("bfloat16", 64), experts=ExpertPolicy("route", 90)).ledger
        assert sum(row["error_after"] for row in rows) < 0.9 * sum(row["error_before"] for row in rows)
