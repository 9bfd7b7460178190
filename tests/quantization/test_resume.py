"""A killed quantization goes on where it was and ends where it would have ended, bit for bit."""

import logging
from contextlib import suppress

import pytest
import torch
from helpers.damage import flip
from helpers.interrupted_runs import KilledError, run, same
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model

from gptq_awq.api import load_method
from gptq_awq.calibration import moments
from gptq_awq.calibration import observation as observe
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.table import TableGrid
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.runtime.fingerprint import observations_sha256
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.storage.journal import Journal

METHODS = {
    "rtn": load_method("rtn")[0],
    "gptq": load_method("gptq")[0],
    "awq": load_method("awq")[0],
    "awq_gptq": load_method("awq_gptq")[0],
    "gptq, act_order": Method("gptq", GPTQ(act_order=True)),
    "gptq on full precision": Method("gptq", GPTQ(), error_propagation=False),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, method, name):
    plain = run(METHODS[method], name)
    journal = Journal(tmp_path / "j", "key")
    with pytest.raises(KilledError):
        run(METHODS[method], name, journal, kill_after=0)
    assert journal.count() >= 1
    assert same(run(METHODS[method], name, journal), plain)


def test_what_was_finished_is_restored_and_not_computed_again(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j", "key")
    run(METHODS["gptq"], journal=journal)
    blocks = list(quantize(tiny_model("llama"), tokens(), METHODS["gptq"], GRID, SMALL, progress=journal))
    assert [block.restored for block in blocks] == [True, True]


def test_progress_is_a_byte_per_weight_and_one_stream(tmp_path):
    journal = Journal(tmp_path / "j", "key")
    with suppress(KilledError):
        run(METHODS["gptq"], journal=journal, kill_after=0)
    model = tiny_model("llama")
    weights = sum(p.numel() for p in model.model.layers[0].parameters())
    batch = tokens().ids.numel() * 64 * 4
    size = sum(path.stat().st_size for path in (tmp_path / "j").rglob("*.safetensors"))
    assert size < 1.3 * weights + batch + 20_000


@pytest.mark.parametrize("which", ["block-0000", "activations-0000/000001"])
def test_damaged_progress_is_said_and_never_used(tmp_path, which, caplog):
    plain = run(METHODS["gptq"])
    journal = Journal(tmp_path / "j", "key")
    with suppress(KilledError):
        run(METHODS["gptq"], journal=journal, kill_after=0)
    flip(tmp_path / "j" / f"{which}.safetensors", -5)
    with caplog.at_level(logging.WARNING):
        assert same(run(METHODS["gptq"], journal=journal), plain)
    assert "can't be used (checksum mismatch)" in caplog.text


def test_foreign_progress_is_said_and_never_used(tmp_path, caplog):
    with suppress(KilledError):
        run(METHODS["rtn"], journal=Journal(tmp_path / "j", "another run"), kill_after=0)
    with caplog.at_level(logging.WARNING):
        assert same(run(METHODS["gptq"], journal=Journal(tmp_path / "j", "key")), run(METHODS["gptq"]))
    assert "another computation" in caplog.text


def test_a_full_disk_costs_the_progress_and_not_the_run(tmp_path, monkeypatch, caplog):
    plain = run(METHODS["gptq"])

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    with caplog.at_level(logging.WARNING):
        assert same(run(METHODS["gptq"], journal=Journal(tmp_path / "j", "key")), plain)
    assert caplog.text.count("No space left") == 1


@pytest.mark.parametrize(
    "grid", [TableGrid("nf4", 32, double_quant=True), LlamaMix("q4_k_m"), IntGrid(2, -1, sym=True)]
)
def test_every_kind_of_grid_comes_back(tmp_path, grid):
    journal = Journal(tmp_path / "j", "key")
    plain = run(METHODS["gptq"], grid=grid)
    with suppress(KilledError):
        run(METHODS["gptq"], journal=journal, kill_after=0, grid=grid)
    assert same(run(METHODS["gptq"], journal=journal, grid=grid), plain)


# ------------------------------------------------------------------------------------- the record of full precision


def record(tmp_path, room=10**9):
    return ObservationCache(Journal(tmp_path / "record", "key"), room)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("method", ["awq", "gptq on full precision"])
def test_a_recorded_calibration_gives_the_same_codes_as_a_fresh_one(tmp_path, method, name, monkeypatch):
    plain = run(METHODS[method], name)
    assert same(run(METHODS[method], name, record=record(tmp_path)), plain)
    monkeypatch.setattr(observe, "observe_forward", None)  # calibrating again would need it
    assert same(run(METHODS[method], name, record=record(tmp_path)), plain)


def test_one_record_serves_every_method_and_grid(tmp_path, monkeypatch):
    run(METHODS["gptq on full precision"], record=record(tmp_path))
    plain = run(METHODS["awq"])
    monkeypatch.setattr(observe, "observe_forward", None)
    assert same(run(METHODS["awq"], record=record(tmp_path)), plain)


def test_a_method_with_error_propagation_leaves_the_record_alone(tmp_path):
    run(METHODS["gptq"], record=record(tmp_path))
    assert not (tmp_path / "record").exists()


def test_a_record_that_was_cut_short_is_completed(tmp_path, monkeypatch):
    plain = run(METHODS["awq"])
    whole, seen = observe.observe_forward, []

    def die(block, index, *rest):
        seen.append(index)
        if seen == [0, 1]:
            raise KilledError
        return whole(block, index, *rest)

    monkeypatch.setattr(observe, "observe_forward", die)
    with pytest.raises(KilledError):
        run(METHODS["awq"], record=record(tmp_path))
    assert same(run(METHODS["awq"], record=record(tmp_path)), plain)
    assert seen == [0, 1, 1]  # block 0 was not observed again


@pytest.mark.parametrize("which", ["block-0000", "block-0001"])
def test_a_damaged_record_is_said_and_made_anew(tmp_path, which, caplog):
    plain = run(METHODS["awq"], record=record(tmp_path))
    flip(tmp_path / "record" / f"{which}.safetensors", -5)
    with caplog.at_level(logging.WARNING):
        assert same(run(METHODS["awq"], record=record(tmp_path)), plain)
    assert "damaged" in caplog.text


def test_a_record_without_room_is_not_begun(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert same(run(METHODS["awq"], record=record(tmp_path, room=1000)), run(METHODS["awq"]))
    assert "cache_gb" in caplog.text
    assert not (tmp_path / "record").exists()


def test_a_killed_run_reads_the_record_and_goes_on(tmp_path):
    plain = run(METHODS["awq"])
    journal = Journal(tmp_path / "j", "key")
    with pytest.raises(KilledError):
        run(METHODS["awq"], journal=journal, kill_after=0, record=record(tmp_path))
    assert same(run(METHODS["awq"], journal=journal, record=record(tmp_path)), plain)


def test_another_model_data_or_precision_has_another_record():
    model, data = tiny_model("llama"), tokens()
    base = observations_sha256(model, "weights", data.sha256, torch.float32, 64)
    others = [
        observations_sha256(model, "other", data.sha256, torch.float32, 64),
        observations_sha256(model, "weights", tokens(rows=5).sha256, torch.float32, 64),
        observations_sha256(model, "weights", data.sha256, torch.bfloat16, 64),
        observations_sha256(model, "weights", data.sha256, torch.float32, 128),
    ]
    assert len({base, *others}) == 5


def test_factors_are_shared_by_all_bits_and_give_the_same_codes(tmp_path, monkeypatch):
    method = METHODS["gptq on full precision"]
    plain = {bits: run(method, grid=IntGrid(bits, 32)) for bits in (3, 4)}
    assert same(run(method, record=record(tmp_path), grid=IntGrid(3, 32)), plain[3])
    monkeypatch.setattr(moments, "inverse_cholesky", None)  # factoring again would need it
    assert same(run(method, record=record(tmp_path), grid=IntGrid(4, 32)), plain[4])


def test_packing_a_symmetric_matrix_loses_nothing():
    for n in (5, 384, 400, 800):
        x = torch.randn(n, n)
        x = x.triu() + x.triu(1).T
        packed = moments.pack_symmetric(x)
        assert torch.equal(moments.unpack_symmetric(packed, n), x)
    assert len(packed) < 0.75 * x.numel()
