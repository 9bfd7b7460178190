"""Laws of learned rounding, against a straight-through estimator written out for torch's autograd."""

from dataclasses import replace

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.interrupted_runs import KilledError
from helpers.quantization_runs import SMALL, tokens
from helpers.quantized_weights import quantized
from helpers.sharp_models import padded, sharp_model
from helpers.tiny_models import MIXTURES, tiny_model, tiny_tokens
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.models.blocks import BlockCalls, Call, call_of_windows, find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal
from gptq_awq.tuning.base import Example
from gptq_awq.tuning.distill import Distill
from gptq_awq.tuning.rounding import LearnedRounding, RoundedLinear

GRID = IntGrid(3, 24, scale_dtype="float16")
LEARNING = LearnedRounding(epochs=8, tokens_per_step=64, rounding_lr=0.03)
WEIGHTS = {
    "natural": quantized(IntGrid(3, 32)),
    "ragged": quantized(IntGrid(3, 40)),
    "act_order": quantized(IntGrid(3, 32), "act_order"),
    "act_order, ragged": quantized(IntGrid(3, 40), "act_order"),
    "per channel": quantized(IntGrid(2, -1)),
    "symmetric": quantized(IntGrid(4, 32, sym=True)),
}


def method(tuning=None, solver=None):
    return Method("m", solver or GPTQ(act_order=True), tuning={"rounding": tuning} if tuning else {})


def run(tuning=None, name="llama", grid: Grid = GRID, data=None, settings=SMALL, solver=None):
    return quantize_model(sharp_model(name), data or tokens(), method(tuning, solver), grid=grid, settings=settings)


def codes(result):
    return [weight.sha256() for weight in result.weights.values()]


def layer(weight, original, margin=0.1, kind=nn.Linear):
    rows, columns = weight.codes.shape
    linear = nn.Linear(columns, rows) if kind is nn.Linear else Conv1D(rows, columns)
    matrix(linear).copy_(weight.dequantize())
    linear.requires_grad_(False)
    assert linear.bias is not None
    linear.bias.copy_(torch.linspace(-1, 1, rows))
    return RoundedLinear(linear, weight, original, margin)


def around(weight, seed=1, spread=0.7):
    """A full-precision weight whose rounding to nearest is often another code."""
    noise = torch.randn(weight.codes.shape, generator=torch.Generator().manual_seed(seed))
    return weight.dequantize() + spread * noise * weight.scales[:, weight.group_of_column]


def straight_through(weight, latent, delta):
    """Ŵ, whose gradient passes ⌊·⌉ as if it weren't there."""
    rounded = latent.round().detach() + (latent - latent.detach())
    group = weight.group_of_column
    scales = (weight.scales * delta.exp())[:, group]
    return scales * (rounded.clamp(0, weight.grid.arithmetic.max_code) - weight.zeros[:, group])


# ------------------------------------------------------------------------------------------------------- one linear


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("case", WEIGHTS)
def test_a_linears_gradients_are_the_straight_through_estimators(case, kind):
    weight, draw = WEIGHTS[case], torch.Generator().manual_seed(2)
    ours = layer(weight, around(weight), kind=kind)
    assert ours.bias is not None
    ours.latent.data.add_(0.6 * torch.randn(ours.latent.shape, generator=draw))
    ours.delta.data.add_(0.1 * torch.randn(ours.delta.shape, generator=draw))
    ours.latent.data.clamp_(-0.499, ours.max_code + 0.499)  # where steps keep them
    assert ((ours.latent < 0) | (ours.latent > ours.max_code)).any()
    x = torch.randn(2, 5, weight.codes.shape[1], generator=draw)
    towards = torch.randn(2, 5, len(weight.codes), generator=draw)

    leaves = [each.detach().clone().requires_grad_() for each in (x, ours.latent, ours.delta)]
    plain = leaves[0] @ straight_through(weight, *leaves[1:]).T + ours.bias.detach()
    ((plain - towards) ** 2).sum().backward()
    x = x.requires_grad_()
    out = ours(x)
    ((out - towards) ** 2).sum().backward()

    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    for own, wanted in zip((x.grad, ours.latent.grad, ours.delta.grad), leaves, strict=True):
        assert own is not None
        assert wanted.grad is not None
        assert (own - wanted.grad).norm() < 1e-5 * wanted.grad.norm()


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("case", WEIGHTS)
def test_latents_start_in_their_codes_cells_nearest_to_the_weight(case, margin):
    weight = WEIGHTS[case]
    original = around(weight)
    start = layer(weight, original, margin)
    assert torch.equal(start.codes(start.latent), weight.codes.float())
    torch.testing.assert_close(start.weight(start.latent, start.delta), weight.dequantize(), rtol=1e-6, atol=1e-9)
    group = weight.group_of_column
    exact = original / weight.scales[:, group] + weight.zeros[:, group]
    away = (start.latent - weight.codes.float()).abs()
    assert away.max() <= 0.5 - margin + 1e-5
    inside = (exact - weight.codes.float()).abs() < 0.5 - margin - 2e-3
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(start.latent[inside], exact[inside], rtol=1e-4, atol=1e-4)


def test_signround_starts_at_the_weights_themselves():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight = RTN().solve(w, None, IntGrid(4, 32)).quantized
    group = weight.group_of_column
    latent = layer(weight, w, margin=0.0).latent
    exact = w / weight.scales[:, group] + weight.zeros[:, group]
    inside = (exact > -0.5) & (exact < 15.5)
    assert (latent - exact)[inside].abs().max() < 1.5e-3  # less than a tie is away from its cell


# -------------------------------------------------------------------------------------------------------- one block


class Block(nn.Module):
    """Two linears with a norm before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.requires_grad_(False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def problem(grid: Grid = IntGrid(3, 16), windows=4, per_batch=2):  # noqa: B008 (frozen)
    """A rounded block, its weights, the originals, and examples of full precision."""
    block = Block()
    inputs = torch.randn(windows, 8, 32, generator=torch.Generator().manual_seed(1))
    targets = block(inputs)
    parts = zip(inputs.split(per_batch), targets.split(per_batch), strict=True)
    examples = [Example(x, y, Call(), None) for x, y in parts]
    originals = {name: getattr(block, name).weight.clone() for name in ("up", "down")}
    weights = {name: RTN().solve(w, None, grid).quantized for name, w in originals.items()}
    for name, weight in weights.items():
        getattr(block, name).weight.copy_(weight.dequantize())
    return block, weights, originals, examples


def error(block, examples):
    return float(sum((block(e.inputs) - e.targets).square().sum() for e in examples))


def test_a_step_goes_against_autograds_gradient_of_the_blocks_error():
    block, weights, originals, examples = problem()
    x, y = torch.cat([e.inputs for e in examples]), torch.cat([e.targets for e in examples])
    deltas = {name: torch.zeros_like(w.scales, requires_grad=True) for name, w in weights.items()}
    latents = {name: layer(w, originals[name]).latent.detach().requires_grad_() for name, w in weights.items()}
    state = {f"{name}.weight": straight_through(w, latents[name], deltas[name]) for name, w in weights.items()}
    (functional_call(block, state, (x,)) - y).square().mean().backward()
    step = LearnedRounding(
        epochs=1, tokens_per_step=x[..., 0].numel(), rounding_lr=0.5, scale_lr=0.08, optimizer="sign"
    )
    before = float((block(x) - y).square().mean() / y.square().mean())
    tuned, details = step.apply_block(block, weights, originals, examples)
    assert details["steps"] == 1
    assert details["error_first_pass"] == pytest.approx(before, rel=1e-4)
    for name, weight in tuned.items():
        of_delta, of_latent = deltas[name].grad, latents[name].grad
        assert of_delta is not None
        assert of_latent is not None
        assert torch.allclose((weight.scales / weights[name].scales).log(), -0.01 * of_delta.sign(), atol=1e-6)
        wanted = (latents[name].detach() - 0.5 * of_latent.sign()).round().clamp(0, 7)
        assert torch.equal(weight.codes.float(), wanted)
        assert (weight.codes != weights[name].codes).any()


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_blocks_error_falls(bits, optimizer):
    block, weights, originals, examples = problem(IntGrid(bits, 16))
    before = error(block, examples)
    tuned, details = replace(LEARNING, epochs=40, tokens_per_step=16, optimizer=optimizer).apply_block(
        block, weights, originals, examples
    )
    assert error(block, examples) < 0.8 * before
    assert details["error_last_pass"] < details["error_first_pass"]
    changed = sum(int((tuned[name].codes != weights[name].codes).sum()) for name in weights)
    assert details["codes_changed"] == pytest.approx(changed / sum(w.codes.numel() for w in weights.values()))
    assert changed > 0


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_codes_stay_codes_and_latents_near_them_however_large_steps_are(optimizer, monkeypatch):
    made = []
    monkeypatch.setattr(
        "gptq_awq.tuning.rounding.RoundedLinear", lambda *args: made.append(RoundedLinear(*args)) or made[-1]
    )
    block, weights, originals, examples = problem()
    wild = LearnedRounding(epochs=10, tokens_per_step=8, rounding_lr=4.0, optimizer=optimizer)
    tuned, _ = wild.apply_block(block, weights, originals, examples)
    for name, weight in tuned.items():
        assert weight.codes.max() <= 7
        assert torch.isfinite(weight.dequantize()).all()
        assert torch.equal(getattr(block, name).weight, weight.dequantize())
    assert [bool(((each.latent >= -0.5) & (each.latent <= 7.5)).all()) for each in made] == [True, True]


@pytest.mark.parametrize("windows", [3, 5, 8])
@pytest.mark.parametrize("tokens_per_step", [1, 16, 40, 1000])
def test_every_window_is_seen_as_often_as_epochs_say(windows, tokens_per_step, monkeypatch):
    block, weights, originals, examples = problem(windows=windows)
    seen, run_block = [], Call.run
    monkeypatch.setattr(Call, "run", lambda self, *args: seen.append(len(args[1])) or run_block(self, *args))
    replace(LEARNING, tokens_per_step=tokens_per_step).apply_block(block, weights, originals, examples)
    assert sum(seen) == pytest.approx(LEARNING.epochs * windows, abs=max(1, tokens_per_step // 8))


@pytest.mark.parametrize(
    "grid", [TableGrid("nf4", 32), TableGrid("nf4", 32, double_quant=True), AffineGrid(3, 32), KGrid("q6_k")]
)
def test_formats_without_integer_zeros_and_free_scales_are_refused_by_name(grid):
    with pytest.raises(UserError, match=f"method.tuning.rounding: .*grid={grid.label}".replace("+", r"\+")):
        LEARNING.check(grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"rounding_lr": -1}, "rounding_lr=-1"),
        ({"scale_lr": -0.5}, "scale_lr=-0.5"),
        ({"vector_lr": -1}, "vector_lr=-1"),
        ({"margin": 0.5}, "margin=0.5"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"optimizer": "sgd"}, "optimizer=sgd: give one of sign, adam"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=f"LearnedRounding.{message}"):
        LearnedRounding(**options)


# ------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt-post-norm"])
def test_no_epoch_leaves_everything_as_the_solver_left_it(name, margin, compute_dtype):
    settings = replace(SMALL, compute_dtype=compute_dtype)
    nothing = replace(LEARNING, epochs=0, margin=margin)
    plain, tuned = (run(tuning, name, settings=settings) for tuning in (None, nothing))
    assert codes(plain) == codes(tuned)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(tuned.model.state_dict()[key], value), key
    assert tuned.ledger[0]["tuning"]["rounding"] == {"steps": 0, "codes_changed": 0.0}


@pytest.mark.parametrize("solver", [GPTQ(act_order=True), GPTQ(act_order=True, static_groups=True), RTN()])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_the_models_hidden_states_come_nearer_to_full_precision(name, solver):
    def hidden(model):
        return model(tokens().ids, output_hidden_states=True).hidden_states[-1]

    full = hidden(sharp_model(name))
    plain, tuned = run(None, name, solver=solver), run(LEARNING, name, solver=solver)
    before, after = ((hidden(each.model) - full).square().mean() for each in (plain, tuned))
    assert after < 0.9 * before
    for row in tuned.ledger:
        weight = tuned.weights[row["name"]]
        assert torch.equal(matrix(tuned.model.get_submodule(row["name"])), weight.dequantize())
        assert torch.equal(weight.scales.half().float(), weight.scales)
        assert row["codes_sha256"] == weight.sha256()
        assert 0 < row["tuning"]["rounding"]["codes_changed"] < 0.5
    assert all(is_linear(tuned.model.get_submodule(key)) for key in tuned.weights)
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_one_seed_learns_one_result_and_another_seed_another():
    one, again, other = (codes(run(replace(LEARNING, seed=seed))) for seed in (0, 0, 1))
    assert one == again != other


def test_padded_calibration_is_refused_with_the_option_to_change():
    with pytest.raises(UserError, match=r"method.tuning.rounding: .*data.packing=windows"):
        run(LEARNING, data=padded(tokens()))


def test_distillation_goes_on_from_learned_codes():
    both = Method("m", RTN(), tuning={"distill": Distill(epochs=2, tokens_per_step=64), "rounding": LEARNING})
    learned = run(LEARNING, solver=RTN())
    tuned = quantize_model(sharp_model(), tokens(), both, grid=GRID, settings=SMALL)
    for key, weight in learned.weights.items():
        assert torch.equal(tuned.weights[key].codes, weight.codes)
        assert not torch.equal(tuned.weights[key].scales, weight.scales)
    assert tuned.ledger[0]["tuning"].keys() == {"rounding", "distill"}


def killed(journal, tuning, kill_after=None):
    model, done = sharp_model(), {}
    for block in quantize(model, tokens(), method(tuning), GRID, SMALL, progress=journal):
        done |= {row["name"]: (row["codes_sha256"], row["tuning"]) for row in block.rows}
        if block.index == kill_after:
            raise KilledError
    return done, model.state_dict()


@pytest.mark.parametrize("tuning", [LEARNING, replace(LEARNING, vector_lr=0.01)])
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, tuning):
    plain, journal = killed(None, tuning), Journal(tmp_path / "j", "key")
    with pytest.raises(KilledError):
        killed(journal, tuning, kill_after=0)
    assert journal.count() == 1
    again = killed(journal, tuning)
    assert again[0] == plain[0]
    assert all(torch.equal(value, again[1][key]) for key, value in plain[1].items())


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3_text", "gemma4_text"])
def test_windows_of_several_batches_are_called_with_their_own_arguments(name):
    model = tiny_architecture(name)
    _, blocks = find_blocks(model)
    calls, ids = BlockCalls(model, blocks), tiny_tokens(5, 24)
    batches = [calls.record(part) for part in (ids[:2], ids[2:])]
    rows = [(1, 2), (0, 1), (1, 0)]  # batch, row in it
    with torch.no_grad():
        for index, block in enumerate(blocks[:2]):
            expected = [arguments[index].run(block, hidden) for hidden, arguments in batches]
            chosen = [(batches[b][1][index], row, len(batches[b][0])) for b, row in rows]
            hidden = torch.stack([batches[b][0][row] for b, row in rows])
            found = call_of_windows(chosen).run(block, hidden)
            torch.testing.assert_close(found, torch.stack([expected[b][row] for b, row in rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_learn_too(name):
    method = Method("learned", GPTQ(), tuning={"rounding": LEARNING, "distill": Distill(tokens_per_step=64)})
    model = tiny_model(name)
    done = quantize_model(model, tokens(8), method, grid=IntGrid(3, 32), settings=SMALL)
    experts = [row for row in done.ledger if ".experts." in row["name"]]
    assert experts
    for row in experts:
        learned = row["tuning"]["rounding"]
        assert learned["error_last_pass"] < learned["error_first_pass"]
    for key, weight in done.weights.items():
        assert torch.equal(matrix(model.get_submodule(key)), weight.dequantize())
