"""Laws of benchmarks/peers.py: what it checks and scores; and, where a peer is installed, what its driver leaves."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny_models import tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq_awq import quantize_model
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.load import LocalModel
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings
from gptq_awq.solvers.gptq import GPTQ

BENCHMARKS = ROOT / "benchmarks"
GROUP = 32


@pytest.fixture(scope="module")
def peers():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_peers", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def arena(peers, tiny_folder, tmp_path):
    """A tiny model, both its blocks to be quantized, the first of them in rows of AWQ."""
    loaded = LocalModel(path=str(tiny_folder)).load("float32", "cpu")
    options = argparse.Namespace(
        **{"bits": 4, "group_size": GROUP, "sym": False, "batch_size": 2, "iters": 2, "threads": 1, "timeout": 300},
        **{"layers": None, "awq_layers": 1, "repeat": 1},
    )
    windows = make_token_set("tiny", tiny_tokens(2, 24, seed=1), None, "memory")
    folders = {count: peers.save_cut(loaded, count, tmp_path / str(count)) for count in (1, 2)}
    return peers.Arena(loaded, windows, tiny_tokens(4, 64), folders, options)


def rounded(model, bits=4):
    """The model's blocks rounded to nearest, by name."""
    quantize_model(model, method="rtn", grid=IntGrid(bits, GROUP))
    return {name: p.clone() for name, p in model.named_parameters()}


def test_every_peer_has_a_driver_and_rows_name_no_one_else(peers):
    for name in (peers.OURS, *peers.PEERS):
        assert (peers.DRIVERS / f"run_{name}.py").is_file()
    assert {name for row in peers.ROWS.values() for name in row.peers} == set(peers.PEERS)


def test_every_peers_turn_stands_between_two_of_ours(peers):
    order = list(peers.turns(["a", "b"], repeat=2))
    for name in ("a", "b"):
        places = [i for i, who in enumerate(order) if who == name]
        assert len(places) == 2
        assert all(order[i - 1] == order[i + 1] == peers.OURS for i in places)


@pytest.mark.parametrize("columns", [64, 80], ids=["whole groups", "a ragged group"])
def test_levels_counts_the_distinct_values_of_the_richest_group(peers, columns):
    weight = torch.randint(-9, 9, (7, columns), generator=torch.Generator().manual_seed(0)).float()
    weight[3, 32:64] = torch.arange(32)
    assert peers.levels(weight, 32) == max(
        len(set(row[start : start + 32])) for row in weight.tolist() for start in range(0, columns, 32)
    )


def test_weights_that_are_missing_unchanged_or_off_the_grid_are_told(peers):
    model = tiny_model("llama")
    names, weights = peers.linears_of(model, 2), rounded(tiny_model("llama"))
    first = names[0]
    assert len(names) == 14
    assert first == "model.layers.0.self_attn.q_proj.weight"
    assert peers.off_grid(model, weights, names, 4, GROUP) is None
    assert peers.off_grid(model, weights, names, 3, GROUP) == f"{first} has 16 values in a group"
    full = dict(model.named_parameters())
    assert peers.off_grid(model, weights | {first: full[first]}, names, 4, GROUP) == f"{first} was not quantized"
    weights.pop(first)
    assert peers.off_grid(model, weights, names, 4, GROUP) == f"{first} is not among the weights it left"


def test_scored_is_transformers_own_loss_with_those_weights_and_leaves_the_model_as_it_was(peers, arena):
    model, windows = arena.loaded.model, arena.windows
    before = {name: p.clone() for name, p in model.named_parameters()}
    other = AutoModelForCausalLM.from_pretrained(arena.folders[2], dtype=torch.float32).eval()
    weights = rounded(other)
    with torch.no_grad():
        loss = torch.stack([other(row[None], labels=row[None]).loss for row in windows.ids]).mean()
    assert peers.scored(model, weights, windows) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="has no weight spare"):
        peers.scored(model, {"spare": torch.zeros(1)}, windows)


def test_a_cut_model_computes_what_the_first_blocks_compute(arena):
    cut = AutoModelForCausalLM.from_pretrained(arena.folders[1], dtype=torch.float32).eval()
    full, ids = arena.loaded.model, arena.tokens[:1]
    with torch.no_grad():
        states = full.model(ids, output_hidden_states=True).hidden_states
        assert len(states) == 3
        assert torch.equal(cut.model(ids).last_hidden_state, full.model.norm(states[1]))


def test_ours_runs_the_methods_that_its_settings_name(peers, arena, tmp_path):
    assert peers.attempt(arena, peers.ROWS["gptq_plain"], peers.OURS, "float32", tmp_path / "job") is None
    told = json.loads((tmp_path / "job" / "answer.json").read_text())
    left = load_file(tmp_path / "job" / "weights.safetensors")
    assert set(left) == {name for name, _ in arena.loaded.model.named_parameters()}
    assert told["settings"] == "grid.search=minmax, act_order=False"
    assert told["threads"] == 1
    assert told["seconds"] > 0
    model = AutoModelForCausalLM.from_pretrained(arena.folders[2], dtype=torch.float32).eval()
    grid = IntGrid(4, GROUP, scale_dtype="float16")
    method, settings = Method("gptq", GPTQ(damping=0.01)), Settings(compute_dtype="float32")
    done = quantize_model(model, arena.tokens, method, grid=grid, settings=settings)
    for name in done.weights:
        assert torch.equal(left[f"{name}.weight"], model.get_parameter(f"{name}.weight"))


def test_who_fails_is_told_in_the_table_and_the_others_go_on(peers, arena, monkeypatch):
    runs = []

    def call(name, folder, threads, timeout):
        runs.append((name, threads))
        if name != peers.OURS:
            return "ValueError: a | b"
        job = json.loads((folder / "job.json").read_text())
        weights = rounded(AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), job["bits"])
        save_file(weights, folder / "weights.safetensors")
        told = {"seconds": 2.0 + len(runs), "peak_bytes": 5e9, "settings": "none"}
        (folder / "answer.json").write_text(json.dumps(told))
        return None

    monkeypatch.setattr(peers, "call", call)
    row = peers.ROWS["rtn"]
    records = peers.compete(arena, row, ["autoround"], "float32")
    assert [name for name, _ in runs] == [peers.OURS, "autoround", peers.OURS, peers.OURS]
    ours, theirs = peers.lines_of(row, records, "float32")
    assert "failed: ValueError: a \\| b" in theirs
    assert "| 5.00 s | 5.50 s | 1.00 | 5.00 GB |" in ours
    assert ours.count("|") == theirs.count("|") - 1 == peers.HEADER.splitlines()[1].count("|")


def test_a_peer_that_is_not_installed_says_how_to_install_it(peers, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_ENGINES", str(tmp_path))
    told = "not installed: python scripts/install_engine.py autoround"
    assert peers.call("autoround", tmp_path, threads=1, timeout=9) == told


def test_the_last_line_of_a_failure_is_kept(peers):
    assert peers.last_line("Traceback\n  File\nValueError: no\n\n", 1) == "ValueError: no"
    assert peers.last_line("", 3) == "exit code 3"
    assert peers.last_line("words", -9) == "killed by signal 9"


def asked(peers_of_rows=(("rtn", 3), ("gptq_plain", 2), ("gptq", 2), ("awq_plain", 1), ("autoround", 1))):
    """Rows and their peers, as far as a tiny model and float32 serve (GPTQModel's AWQ takes neither)."""
    names = ("llmcompressor", "gptqmodel", "autoround")
    for row, count in peers_of_rows:
        for name in names[-1:] if row == "autoround" else names[:count]:
            yield pytest.param(row, name, id=f"{row}-{name}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("row", "name"), asked())
def test_a_peer_leaves_every_linear_on_its_grid_and_near_what_it_was(peers, arena, tmp_path, row, name):
    if peers.python_of(name) is None:
        pytest.skip(f"{name} is not installed: python scripts/install_engine.py {name}")
    assert peers.attempt(arena, peers.ROWS[row], name, "float32", tmp_path / "job") is None
    weights = load_file(tmp_path / "job" / "weights.safetensors")
    model = arena.loaded.model
    names = peers.linears_of(model, arena.blocks(peers.ROWS[row]))
    assert peers.off_grid(model, weights, names, 4, GROUP) is None
    full = peers.scored(model, {}, arena.windows)
    assert peers.scored(model, weights, arena.windows) == pytest.approx(full, rel=0.1)
