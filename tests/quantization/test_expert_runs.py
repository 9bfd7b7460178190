"""The rest of a run with a mixture of experts: other methods, resuming, records, streaming, export."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.mixtures import GRID, codes, lonely, run
from helpers.quantization_runs import SMALL, tokens
from helpers.quantized_weights import NoTokenizer
from helpers.tiny_models import MIXTURES, ROUTED, save_tiny_folder, tiny_model, tiny_tokens
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from gptq_awq.api import load_method
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.errors import UserError
from gptq_awq.export.base import Source, linear_specs
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.folder import Shards
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.write import Exports
from gptq_awq.models.experts import fuse
from gptq_awq.models.offloaded_model import open_offloaded
from gptq_awq.models.unfuse import unfuse
from gptq_awq.quantization.codes import Codes
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings, quantize
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.runtime import memory
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.storage.journal import Journal
from gptq_awq.tuning.rounding import LearnedRounding


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
        record = ObservationCache(Journal(tmp_path / "record", "key"), 10**9)
        rows, found = [], {}
        for block in quantize(
            lonely("deepseek-v3"), tokens(), load_method("awq")[0], GRID, SMALL, record=record, experts=experts
        ):
            rows += block.rows
            found |= {key: weight.sha256() for key, weight in block.weights.items()}
        assert found == codes(plain)
        assert [row.get("experts") for row in rows] == [row.get("experts") for row in plain.ledger]


def test_a_record_whose_last_blocks_have_experts_is_not_begun_without_room(tmp_path):
    first = 4 * (64**2 * 2 + 32**2 * 2 + 96**2)  # bytes of the dense first block's moments
    record = ObservationCache(Journal(tmp_path / "record", "key"), 3 * first)
    for _ in quantize(tiny_model("deepseek-v3"), tokens(), load_method("awq")[0], GRID, SMALL, record=record):
        pass
    assert not (tmp_path / "record").exists()


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
    specs = linear_specs(model, assign_grids(model, GRID), True)
    with pytest.raises(UserError, match=r"export.formats=bnb: its readers want no fused experts"):
        Exports((BnbFormat(),)).check(specs, model, NoTokenizer())
    Exports((HFFormat(),)).check(specs, model, NoTokenizer())


def test_what_waits_in_experts_and_their_moments_are_forecast():
    assert memory.routed_bytes(tokens=1000, hidden=64, itemsize=2, squares=0) == 4 * 1000 * 64 * 2
    assert memory.routed_bytes(0, 64, 2, squares=8 * 64**2) == 8 * 64**2 * 4


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


def opened(folder):
    return open_offloaded(folder, AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"), "model")


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_streamed_mixture_gets_the_codes_of_one_in_memory(name, method, tmp_path):
    policy = ExpertPolicy("route", 60)
    plain = run(name, method, experts=policy)
    model = opened(save_tiny_folder(tmp_path / "model", name))
    found = {}
    journal = Journal(tmp_path / "j", "key")
    for block in quantize(model, tokens(), load_method(method)[0], GRID, SMALL, progress=journal, experts=policy):
        found |= {key: weight.sha256() for key, weight in block.weights.items()}
    assert found == codes(plain)
    assert torch.allclose(model(tiny_tokens()).logits, plain.model(tiny_tokens()).logits, atol=1e-5)


def test_a_streamed_mixtures_checkpoint_is_that_of_one_in_memory_and_at_no_time_in_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(
        MIXTURES, "deep", lambda: MixtralConfig(**ROUTED | {"num_hidden_layers": 6}, num_local_experts=4)
    )
    folder, format_, sizes = save_tiny_folder(tmp_path / "model", "deep"), HFFormat("float32", shard="300KB"), []
    flush = Shards._flush
    monkeypatch.setattr(Shards, "_flush", lambda self: (sizes.append(tensor_bytes()), flush(self)))
    for name, model in (("offloaded", opened(folder)), ("whole", AutoModelForCausalLM.from_pretrained(folder))):
        (tmp_path / name).mkdir()
        source = in_journal(model, tmp_path / "j" / name, offloaded=name == "offloaded")
        before = tensor_bytes()
        format_.write(source, tmp_path / name)
        assert max(sizes) - before < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    paths = list((tmp_path / "whole").iterdir())
    assert len(paths) > 6
    for path in paths:
        assert (tmp_path / "offloaded" / path.name).read_bytes() == path.read_bytes(), path.name
    decoded = {each.name: each.weight for each in format_.decode(tmp_path / "offloaded")}
    assert decoded.keys() == source.weights.keys()
    assert all(torch.equal(decoded[key], weight.dequantize()) for key, weight in source.weights.items())


def in_journal(model, folder, offloaded):
    """A model rounded to the nearest; a offloaded one's codes are in a journal."""
    unfuse(model)
    journal = Journal(folder, "key")
    codes = Codes(journal, assign_grids(model, GRID), offloaded, wanted=True)
    for block in quantize(model, None, load_method("rtn")[0], GRID, SMALL, progress=journal):
        codes.add(block)
    return Source(model, NoTokenizer(), "tiny", codes.weights())


def tensor_bytes():
    """Of all tensors in this process, each storage once."""
    found = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())
