"""Laws of full precision beside the quantized model: cross moments, paired forwards, activations that are kept."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens
from helpers.watching_solvers import Keep, Watching

from gptq_awq.calibration.activations import open_activations
from gptq_awq.calibration.block_inputs import Inputs, calibration_of
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.calibration.observation import in_dtype
from gptq_awq.calibration.sequential import staged_forward
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import find_blocks
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.runtime import memory
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.checksummed import DamagedError
from gptq_awq.storage.journal import Journal
from gptq_awq.transforms.awq import AWQ

CPU = torch.device("cpu")


def run(solver, name="llama", settings=SMALL, data=None, transforms=None, **options):
    model = tiny_model(name)
    method = Method("m", solver, transforms or {})
    blocks = list(quantize(model, data or tokens(), method, GRID, settings, **options))
    return {row["name"]: row["codes_sha256"] for block in blocks for row in block.rows}


def drifted(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, width, generator=generator) * torch.logspace(-1, 1, width)
    return (full + 0.3 * torch.randn(rows, width, generator=generator)).to(dtype), full.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 48, 101])
def test_cross_is_the_mean_product_of_what_is_seen_and_what_full_precision_sees(dtype, width):
    x, full = drifted(301, width, dtype)
    total = MomentsSum(width, CPU)
    for part in range(0, 301, 100):
        total.add(x[part : part + 100], None, full[part : part + 100])
    moments = total.finish("here")
    for ours, exact in (
        (moments.cross, x.double().T @ full.double() / 301),
        (moments.hessian, x.double().T @ x.double() / 301),
    ):
        assert (ours - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_without_drift_cross_is_the_hessian(dtype, tolerance):
    x, _ = drifted(5001, 101, dtype)
    total = MomentsSum(101, CPU)
    total.add(x, None, x.clone())
    moments = total.finish("here")
    assert (moments.drift().norm() <= tolerance * moments.hessian.norm()).item()


def test_padding_is_in_no_sum():
    x, full = drifted(60, 24, torch.bfloat16)
    mask = torch.arange(60).reshape(4, 15) % 5 < 3
    masked, plain = MomentsSum(24, CPU), MomentsSum(24, CPU)
    masked.add(x.view(4, 15, 24), mask, full.view(4, 15, 24))
    plain.add(x[mask.flatten()], None, full[mask.flatten()])
    assert torch.equal(masked.finish("here").cross, plain.finish("here").cross)


def test_a_rescaled_input_rescales_cross():
    x, full = drifted(60, 24, torch.float32)
    s = torch.rand(24) + 0.5
    total, scaled = MomentsSum(24, CPU), MomentsSum(24, CPU)
    total.add(x, None, full)
    scaled.add(x / s, None, full / s)
    assert torch.allclose(total.finish("here").rescaled(s).cross, scaled.finish("here").cross, rtol=1e-4, atol=1e-6)


def test_non_finite_full_precision_is_refused():
    x, full = drifted(60, 24, torch.float32)
    full[3, 4] = torch.inf
    total = MomentsSum(24, CPU)
    total.add(x, None, full)
    with pytest.raises(UserError, match="non-finite activations enter here"):
        total.finish("here")


def test_moments_without_cross_say_so():
    with pytest.raises(ValueError, match="cross"):
        Moments(torch.eye(3), torch.ones(3), 1).drift()


@pytest.mark.parametrize("transforms", [{}, {"awq": AWQ(ratio_steps=5)}])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_left_alone_drifts_nowhere(name, transforms):
    seen = []
    run(Keep(seen), name, transforms=transforms)
    for moments in seen:
        assert moments.drift().norm() < 1e-5 * moments.hessian.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_are_of_the_same_site_and_token(name):
    """The plain reference: sites' inputs of both models, kept whole."""
    solver, seen = RTN(), []
    model, full = tiny_model(name), tiny_model(name)
    sums = []
    _, blocks = find_blocks(model)
    _, originals = find_blocks(full)
    list(quantize(model, tokens(), Method("m", Watching(solver, seen)), GRID, SMALL))
    inputs = {}

    def note(key):
        return lambda _module, args: inputs.__setitem__(key, args[0].reshape(-1, args[0].shape[-1]))

    attention = {"llama": "self_attn.q_proj", "gpt2": "attn.c_attn"}[name]
    blocks[1].get_submodule(attention).register_forward_pre_hook(note("quantized"))
    originals[1].get_submodule(attention).register_forward_pre_hook(note("full"))
    for each in (model, full):
        each(tokens().ids)
    sums = inputs["quantized"].T @ inputs["full"] / len(inputs["full"])
    ours = seen[len(seen) // 2].cross  # the first of the second block's
    assert (ours - sums).norm() < 1e-4 * sums.norm()
    assert seen[len(seen) // 2].drift().norm() > 1e-2 * sums.norm()


def test_full_precision_beside_changes_nothing_for_a_solver_that_ignores_it():
    assert run(Watching(GPTQ(), [])) == run(GPTQ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_moments_to_the_last_bit(dtype):
    seen = {"keep": [], "recompute": []}
    for way, noted in seen.items():
        run(Watching(GPTQ(), noted), settings=replace(SMALL, activations=way, compute_dtype=dtype))
    for kept, recomputed in zip(*seen.values(), strict=True):
        assert torch.equal(kept.cross, recomputed.cross)
        assert torch.equal(kept.hessian, recomputed.hessian)


@pytest.mark.parametrize("needs_hessian", [True, False])
def test_after_a_block_the_streams_hold_full_precisions_outputs(needs_hessian, monkeypatch):
    """With a solver that needs H (staged) and with one that only wants full precision beside."""
    held = []
    from gptq_awq.quantization import quantize as module

    solve = module.BlockStep.run

    def noting(self, inputs):
        solve(self, inputs)
        held.append([s.full for s in inputs.activations.batches])

    monkeypatch.setattr(module.BlockStep, "run", noting)
    transforms = {} if needs_hessian else {"awq": AWQ(ratio_steps=3)}
    run(replace(Watching(RTN(), []), needs_hessian=needs_hessian), transforms=transforms)
    model = tiny_model("llama")
    expected = model(tokens().ids, output_hidden_states=True).hidden_states
    assert torch.allclose(torch.cat(held[0]), expected[1], rtol=1e-3, atol=1e-4)


def test_a_block_can_be_run_again_on_what_entered_it():
    """As methods do that change a block once more after it was solved."""
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    inputs = Inputs(model, blocks, tokens(), SMALL, error_propagation=True, absorbers=False, full=True)
    assert inputs.activations is not None
    entering = [batch.hidden for batch in inputs.activations.batches]
    runner = in_dtype(blocks[0], inputs.dtype)
    staged_forward(
        runner, 0, inputs.sites(blocks[0], 0), inputs.activations, lambda site, moments: None, full=blocks[0]
    )
    outputs = [batch.hidden for batch in inputs.activations.batches]
    for batch, hidden in zip(inputs.activations.batches, entering, strict=True):
        batch.hidden = hidden
    inputs.activations.advance(runner, 0)
    for batch, output in zip(inputs.activations.batches, outputs, strict=True):
        assert torch.equal(batch.hidden, output)
        assert torch.allclose(batch.full, output, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_cross():
    ids = tiny_tokens(4, 24)
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.long)], dim=1)
    mask = torch.arange(32).expand(4, 32) < 24
    plain, masked = [], []
    run(Watching(RTN(), plain), data=make_token_set("plain", ids, None, "test"))
    run(Watching(RTN(), masked), data=make_token_set("padded", padded, mask, "test"))
    for a, b in zip(plain, masked, strict=True):
        assert (a.cross - b.cross).norm() < 1e-3 * a.cross.norm()


def test_restoring_refuses_streams_without_full_precision(tmp_path):
    model, journal = tiny_model("llama"), Journal(tmp_path / "j", "key")
    _, blocks = find_blocks(model)
    full, plain = (open_activations(model, blocks, tokens(), 64, torch.float32, full=f) for f in (True, False))
    plain.keep(journal, 0)
    with pytest.raises(DamagedError, match="1 hidden states"):
        full.restore(journal, 0)


def test_a_killed_run_pairs_as_an_uninterrupted_one(tmp_path):
    plain, again = [], []
    hashes = run(Watching(GPTQ(), plain))
    journal = Journal(tmp_path / "j", "key")

    class KilledError(Exception):
        """Stands for kill -9."""

    with suppress(KilledError):
        for _ in quantize(
            tiny_model("llama"), tokens(), Method("m", Watching(GPTQ(), [])), GRID, SMALL, progress=journal
        ):
            raise KilledError
    assert run(Watching(GPTQ(), again), progress=journal) == hashes
    for before, after in zip(plain[len(again) :], again, strict=True):
        assert torch.equal(before.cross, after.cross)


class Silent:
    """A solver as docs/add_a_method.md has them: it says nothing of cross moments."""

    name, needs_hessian = "silent", True

    def __init__(self) -> None:
        self.seen: list[Moments] = []

    def solve(self, weight, moments, grid):
        self.seen.append(moments)
        return GPTQ().solve(weight, moments, grid)


def test_a_solver_that_says_nothing_of_cross_moments_gets_none():
    solver = Silent()
    list(quantize(tiny_model("llama"), tokens(), Method("silent", solver), GRID, SMALL))  # pyright: ignore[reportArgumentType]
    assert solver.seen
    assert all(moments.cross is None for moments in solver.seen)


def test_without_error_propagation_there_is_no_drift_to_correct():
    with pytest.raises(UserError, match=r"method.error_propagation=false"):
        Method("m", Watching(GPTQ(), []), error_propagation=False)


@pytest.mark.parametrize(("full", "kept"), [(False, True), (True, False)])
def test_the_forecast_counts_both_forwards(monkeypatch, full, kept):
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    held = memory.held_bytes(tokens().ids.numel(), 64, 160, 4)
    alone, beside = (replace(calibration_of(model, tokens(), SMALL, f), tokens_per_batch=0).most for f in (False, True))
    monkeypatch.setattr(memory, "available_bytes", lambda device, budget=None: 3 * held + alone)
    inputs = Inputs(model, blocks, tokens(), SMALL, error_propagation=True, absorbers=False, full=full)
    assert inputs.keeps_activations is kept
    assert alone < beside < 2.5 * alone
