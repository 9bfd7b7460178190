"""Laws of tuned scales and norms, against torch's autograd through a plain dequantization."""

import re
from dataclasses import replace

import pytest
import torch
from helpers.interrupted_runs import KilledError
from helpers.quantization_runs import SMALL, tokens
from helpers.quantized_weights import NoTokenizer, assert_decodes, quantized
from helpers.sharp_models import padded, sharp_model
from helpers.tiny_models import CONFIGS, tiny_model
from torch import nn
from torch.func import functional_call

from gptq_awq import quantize_model, results
from gptq_awq.api import load_method
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.export import mlx
from gptq_awq.export.base import Source
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.per_layer import PerLayerGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.quantization import quantize as quantize_module
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal
from gptq_awq.tuning.distill import Distill
from gptq_awq.tuning.linear import rescaled, tuned_linears
from gptq_awq.tuning.teacher import Teacher

GRID = IntGrid(3, 24, scale_dtype="float16")
LEARNING = Distill(epochs=8, tokens_per_step=64, scale_lr=0.024, vector_lr=1e-3)
EMBEDDING = {"gpt2": "transformer.wte.weight", "gemma3": "model.embed_tokens.weight"}
WEIGHTS = {
    "natural": quantized(IntGrid(3, 32)),
    "ragged": quantized(IntGrid(3, 40)),
    "act_order": quantized(IntGrid(3, 32), "act_order"),
    "act_order, ragged": quantized(IntGrid(3, 40), "act_order"),
    "static groups": quantized(IntGrid(3, 32), "static_groups"),
    "per channel": quantized(IntGrid(3, -1)),
    "symmetric": quantized(IntGrid(3, 32, sym=True)),
    "minimum": quantized(AffineGrid(3, 32, scale_dtype="float32")),
    "ternary": quantized(TernaryGrid(32, scale_dtype="float32")),
}


def run(tuning=None, name="llama", grid: Grid = GRID, data=None, settings=SMALL):
    method = Method("m", GPTQ(act_order=True), tuning={"distill": tuning} if tuning else {})
    return quantize_model(sharp_model(name), data or tokens(), method, grid=grid, settings=settings)


def dequantized(weight, delta):
    """Ŵ of the scales s exp(δ), as its format defines it."""
    group = weight.group_of_column
    scales = (weight.scales * delta.exp())[:, group]
    if weight.grid.arithmetic.kind == "minimum":
        return scales * weight.codes.float() + (weight.zeros * delta.exp())[:, group]
    return scales * (weight.codes.float() - weight.zeros[:, group])


def divergence(logits, full):
    """KL(p‖q) of every token."""
    log_p, log_q = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def logits(model, data):
    mask = None if data.mask is None else data.mask.long()
    return model(data.ids, attention_mask=mask).logits


def one_linear(weight, bias=None):
    linear = nn.Linear(weight.codes.shape[1], weight.codes.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight.dequantize())
    if bias is not None:
        linear.bias.data.copy_(bias)
    return nn.ModuleDict({"lin": linear})


# ------------------------------------------------------------------------------------------------------- one linear


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_linears_gradients_are_autograds(case):
    weight, draw = WEIGHTS[case], torch.Generator().manual_seed(1)
    bias = torch.randn(len(weight.codes), generator=draw)
    layer = tuned_linears(one_linear(weight, bias), {"lin": weight})["lin"]
    x = torch.randn(2, 5, weight.codes.shape[1], generator=draw)
    towards = torch.randn(2, 5, len(weight.codes), generator=draw)
    delta = 0.1 * torch.randn(weight.scales.shape, generator=draw)
    layer.delta.data.copy_(delta)

    theirs_x, theirs = x.clone().requires_grad_(), delta.clone().requires_grad_()
    plain = theirs_x @ dequantized(weight, theirs).T + bias
    ((plain - towards) ** 2).sum().backward()
    ours_x = x.clone().requires_grad_()
    out = layer(ours_x)
    ((out - towards) ** 2).sum().backward()

    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    for ours, wanted in ((layer.delta.grad, theirs.grad), (ours_x.grad, theirs_x.grad)):
        assert ours is not None
        assert wanted is not None
        assert (ours - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_rescaled_weight_is_what_its_layer_computed(case):
    weight = WEIGHTS[case]
    delta = 0.1 * torch.randn(weight.scales.shape, generator=torch.Generator().manual_seed(2))
    layer = tuned_linears(one_linear(weight), {"lin": weight})["lin"]
    layer.delta.data.copy_(delta)
    x = torch.eye(weight.codes.shape[1])
    tuned = rescaled(weight, delta)
    assert torch.equal(tuned.codes, weight.codes)
    torch.testing.assert_close(layer(x).T, tuned.dequantize(), rtol=1e-5, atol=1e-5)
    assert torch.equal(rescaled(weight, torch.zeros_like(delta)).dequantize(), weight.dequantize())


@pytest.mark.parametrize("grid", [IntGrid(3, 32, scale_dtype="float16"), TernaryGrid(32), AffineGrid(3, 32)])
def test_tuned_scales_are_numbers_of_their_format(grid):
    weight = quantized(grid)
    delta = 0.1 * torch.randn(weight.scales.shape, generator=torch.Generator().manual_seed(2))
    tuned = rescaled(weight, delta)
    assert torch.equal(tuned.scales.half().float(), tuned.scales)
    assert torch.equal(tuned.zeros.half().float(), tuned.zeros)
    assert not torch.equal(tuned.scales, weight.scales)


def test_a_group_without_range_keeps_its_value():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w[2, :32] = 0.25
    weight = RTN().solve(w, None, AffineGrid(3, 32)).quantized
    assert weight.scales[2, 0] == 0
    assert torch.equal(rescaled(weight, torch.zeros_like(weight.scales)).dequantize(), weight.dequantize())
    tuned = rescaled(weight, torch.full_like(weight.scales, 0.1)).dequantize()
    assert torch.allclose(tuned[2, :32], 0.25 * torch.tensor(0.1).exp(), rtol=1e-3)


# ------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt-post-norm"])
def test_no_epoch_leaves_everything_as_the_solver_left_it(name, compute_dtype):
    settings = replace(SMALL, compute_dtype=compute_dtype)
    plain, tuned = (run(tuning, name, settings=settings) for tuning in (None, replace(LEARNING, epochs=0)))
    for key, weight in plain.weights.items():
        assert tuned.weights[key].sha256() == weight.sha256()
    for key, value in plain.model.state_dict().items():
        assert torch.equal(tuned.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_stay_and_predictions_come_nearer_to_full_precision(name):
    full = logits(sharp_model(name), tokens())
    plain, tuned = run(None, name), run(LEARNING, name)
    for key, weight in plain.weights.items():
        assert torch.equal(tuned.weights[key].codes, weight.codes)
        assert torch.equal(tuned.weights[key].zeros, weight.zeros)
        assert not torch.equal(tuned.weights[key].scales, weight.scales)
    before, after = (divergence(logits(each.model, tokens()), full).mean() for each in (plain, tuned))
    assert after < 0.9 * before
    details = tuned.ledger[0]["tuning"]["distill"]
    assert details["kl_last_pass"] < details["kl_first_pass"]


@pytest.mark.parametrize("grid", [GRID, AffineGrid(3, 32), TernaryGrid(32)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_holds_what_its_weights_say(name, grid):
    tuned = run(LEARNING, name, grid)
    assert {row["name"] for row in tuned.ledger} == tuned.weights.keys()
    for row in tuned.ledger:
        weight = tuned.weights[row["name"]]
        assert torch.equal(matrix(tuned.model.get_submodule(row["name"])), weight.dequantize())
        assert torch.equal(weight.scales.half().float(), weight.scales)
        assert row["codes_sha256"] == weight.sha256()
    assert all(is_linear(tuned.model.get_submodule(key)) for key in tuned.weights)
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


@pytest.mark.parametrize("grid", [AffineGrid(3, 32), IntGrid(4, 32, scale_dtype="float16")])
def test_a_checkpoint_holds_what_was_tuned(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "_has_mlx", lambda: False)
    method = Method("m", GPTQ(), tuning={"distill": LEARNING})
    tuned = quantize_model(sharp_model(), tokens(), method, grid=grid, settings=SMALL)
    assert_decodes(MLXFormat(), Source(tuned.model, NoTokenizer(), "tiny", tuned.weights), tmp_path)


def kl_gradients(model, weights, data, full):
    """The mean KL over real tokens and its gradients in every δ and vector: autograd through the plain model."""
    deltas = {name: torch.zeros_like(weight.scales, requires_grad=True) for name, weight in weights.items()}
    vectors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.dim() == 1}
    state = dict(vectors)
    for name, delta in deltas.items():
        W = dequantized(weights[name], delta)
        module = model.get_submodule(name)
        state[f"{name}.weight"] = W if isinstance(module, nn.Linear) else W.T
    mask = None if data.mask is None else data.mask.long()
    out = functional_call(model, state, (data.ids,), {"attention_mask": mask}).logits
    kl = divergence(out, full)
    loss = (kl if data.mask is None else kl[data.mask]).mean()
    loss.backward()
    return float(loss.detach()), *(
        {k: x.grad for k, x in each.items() if x.grad is not None} for each in (deltas, vectors)
    )


def gradients(leaves):
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("data", [tokens(), padded(tokens())], ids=["windows", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_step_goes_against_autograds_gradient_of_the_kl(name, data):
    grid = replace(GRID, scale_dtype="float32")
    plain = run(None, name, grid, data)
    kl, deltas, vectors = kl_gradients(plain.model, plain.weights, data, logits(sharp_model(name), data))
    step = Distill(epochs=1, tokens_per_step=data.ids.numel(), scale_lr=0.08, vector_lr=0.02)
    tuned = run(step, name, grid, data)  # Adam's first step: lr towards the gradient's other sign
    assert tuned.ledger[0]["tuning"]["distill"]["kl_first_pass"] == pytest.approx(kl, rel=1e-3)
    assert tuned.ledger[0]["tuning"]["distill"]["steps"] == 1
    for key, grad in deltas.items():
        moved = (tuned.weights[key].scales / plain.weights[key].scales).log()
        clear = grad.abs() > 1e-3 * grad.abs().max()
        assert clear.float().mean() > 0.8
        assert torch.allclose(moved[clear], -0.01 * grad[clear].sign(), rtol=0, atol=1e-5), key
    before, after = dict(plain.model.named_parameters()), dict(tuned.model.named_parameters())
    for key, grad in vectors.items():
        clear = grad.abs() > 1e-3 * grad.abs().max()
        moved = (after[key] - before[key])[clear]
        assert torch.allclose(moved, -0.02 * grad[clear].sign(), rtol=0, atol=1e-5), key


def test_a_bit_more_halves_the_step():
    data, grid = tokens(), PerLayerGrid(3, 24, scale_dtype="float32", overrides={"*.0.*": 2, "*.1.*": 4})
    plain = run(None, "llama", grid, data)
    tuned = run(Distill(epochs=1, tokens_per_step=data.ids.numel(), scale_lr=0.08), "llama", grid, data)
    for key, weight in plain.weights.items():
        moved = (tuned.weights[key].scales / weight.scales).log().abs().max()
        assert float(moved) == pytest.approx(0.08 / 2**weight.grid.bits, rel=1e-3), key
    assert len({weight.grid.bits for weight in plain.weights.values()}) == 2


def test_what_stands_at_padding_changes_nothing():
    data = padded(tokens())
    assert data.mask is not None
    other = make_token_set("other", data.ids.where(data.mask, torch.tensor(7)), data.mask, "test")
    one, two = run(LEARNING, data=data), run(LEARNING, data=other)
    for key, weight in one.weights.items():
        assert two.weights[key].sha256() == weight.sha256()


@pytest.mark.parametrize(("option", "scales_stay"), [("scale_lr", True), ("vector_lr", False)])
def test_a_rate_of_zero_leaves_its_part_alone(option, scales_stay):
    plain, tuned = run(), run(replace(LEARNING, **{option: 0.0}))
    assert all(torch.equal(w.scales, tuned.weights[k].scales) is scales_stay for k, w in plain.weights.items())
    theirs = dict(plain.model.named_parameters())
    for key, parameter in tuned.model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, theirs[key]) is not scales_stay, key


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_tied_embeddings_stay_tied_and_as_they_are(name):
    tuned = run(LEARNING, name).model
    assert tuned.get_output_embeddings().weight is tuned.get_parameter(EMBEDDING[name])
    assert torch.equal(tuned.get_parameter(EMBEDDING[name]), sharp_model(name).get_parameter(EMBEDDING[name]))


def test_one_seed_learns_one_result_and_another_seed_another():
    one, again, other = (run(replace(LEARNING, seed=seed)) for seed in (0, 0, 1))
    hashes = [[weight.sha256() for weight in each.weights.values()] for each in (one, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("grid", [KGrid("q4_k"), TableGrid("nf4", 32, double_quant=True)])
def test_formats_whose_scales_are_not_free_are_refused_by_name(grid):
    with pytest.raises(UserError, match=rf"method.tuning.distill: the format of grid={re.escape(grid.label)} "):
        LEARNING.check(grid)


def test_a_run_on_such_a_format_is_refused():
    with pytest.raises(UserError, match=r"method.tuning.distill: the format of grid=nf4"):
        run(LEARNING, grid=TableGrid("nf4", 32, double_quant=True))


@pytest.mark.parametrize("option", ["epochs", "scale_lr", "vector_lr", "warmup"])
def test_options_out_of_range_are_named(option):
    with pytest.raises(UserError, match=rf"Distill.{option}=-1"):
        Distill(**{option: -1.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="tokens_per_step=0"):
        Distill(tokens_per_step=0)


def test_without_tokens_it_says_what_is_missing():
    method = Method("m", RTN(), tuning={"distill": LEARNING})
    with pytest.raises(UserError, match="data="):
        quantize_model(tiny_model("llama"), None, method, grid=GRID)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    method = load_method("gptq_distill")[0]

    def attempt(journal, kill_after=None):
        model, done = tiny_model("llama"), {}
        blocks = quantize(model, tokens(), method, GRID, SMALL, progress=journal, track=killing(kill_after))
        for block in blocks:
            done |= {name: weight.sha256() for name, weight in block.weights.items()}
        return done, model.state_dict()

    def killing(after):
        def track(items, label, total):
            for count, item in enumerate(items):
                if label.startswith("quantize") and count == after:
                    raise KilledError
                yield item

        return track

    plain, journal = attempt(None), Journal(tmp_path / "j", "key")
    with pytest.raises(KilledError):
        attempt(journal, kill_after=1)
    assert journal.count() == 1
    again = attempt(journal)
    assert again[0] == plain[0]
    assert all(torch.equal(value, again[1][key]) for key, value in plain[1].items())


def test_the_command_line_stores_what_was_tuned(cli, tiny, tmp_path):
    done = cli("method=gptq_distill", "bits=3", *tiny, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    table = results.load(tmp_path)
    assert table["method"].tolist() == ["gptq_distill"]
    assert table["status"].tolist() == ["done"]
    for details in results.read_ledger(tmp_path / "out" / "ledger.jsonl")["tuning"]:
        assert details["distill"]["steps"] == 1  # 2 epochs of 8 windows of 32 tokens, 16 windows a step
        assert details["distill"]["kl_first_pass"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("mask", [False, True])
def test_calibration_that_carries_full_precision_along_brings_the_teacher_its_predictions(name, mask, monkeypatch):
    data = padded(tokens()) if mask else tokens()
    method = Method("m", Qronos(act_order=True), tuning={"distill": LEARNING})
    taught = []
    monkeypatch.setattr(quantize_module, "tuned_model", lambda *args: taught.append(args[3]) or iter(args[2]))
    for carried in (None, lambda *_: False):
        if carried is not None:
            monkeypatch.setattr(quantize_module, "carries_full_precision", carried)
            monkeypatch.setattr(Teacher, "finish", None)
        quantize_model(sharp_model(name), data, method, grid=GRID, settings=SMALL)
    ours, theirs = taught
    real = slice(None) if data.mask is None else data.mask
    torch.testing.assert_close(ours.hidden[real], theirs.hidden[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(ours.hidden[0]), theirs.logits(ours.hidden[0]))


def test_a_run_killed_while_it_tuned_learns_from_the_same_predictions(tmp_path):
    method = Method("m", Qronos(act_order=True), tuning={"distill": LEARNING})
    whole = run_kept(method, None)
    journal = Journal(tmp_path, "same")
    run_kept(method, journal)
    assert journal.count() > 0
    resumed = run_kept(method, journal)  # of which tuning alone is left
    for name, weight in whole.items():
        assert torch.equal(weight.codes, resumed[name].codes)
        torch.testing.assert_close(weight.scales, resumed[name].scales, rtol=1e-2, atol=1e-5)


def run_kept(method, journal):
    """Weights of all linears after tuning, with progress in a journal."""
    blocks = list(quantize(sharp_model("llama"), tokens(), method, GRID, settings=SMALL, progress=journal))
    return {name: weight for block in blocks for name, weight in block.weights.items()}
