"""Laws of the output head: it is solved as any linear is, on what really enters it, and comes back after a kill."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.interrupted_runs import KilledError
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import CONFIGS, save_tiny_folder, tiny_model, tiny_tokens

from gptq_awq import quantize_model, results
from gptq_awq.api import load_method
from gptq_awq.calibration.moments import Moments
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.per_layer import PerLayerGrid
from gptq_awq.models import offloaded_model as offloaded
from gptq_awq.models.linear import matrix
from gptq_awq.models.load import load_folder
from gptq_awq.models.offload import residence, resident
from gptq_awq.models.topology import relative_error
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.journal import Journal

GPTQ_METHOD = Method("gptq", GPTQ(act_order=True, static_groups=True))


def run(name, method, head=None, grid=GRID, data=None):
    model = tiny_model(name)
    options = {"head": head, "untie_head": True} if head else {}
    return quantize_model(model, data or tokens(), method, grid=grid, settings=SMALL, **options)


def head_of(model):
    """Name and module of the output layer."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head), head


def enters_head(model, ids, mask=None):
    """What enters the output layer in one plain forward, as one hook sees it."""
    seen = []
    hook = head_of(model)[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(ids, attention_mask=None if mask is None else mask.long())
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]) if mask is None else seen[0][mask]


def moments(X, full=None):
    return Moments(X.T @ X / len(X), X.abs().mean(0), len(X), cross=None if full is None else X.T @ full / len(X))


def close(codes, others):
    """A sum in another order can flip a rare tie; what follows in that row then differs."""
    return (codes == others).float().mean() > 0.97


@pytest.mark.parametrize("name", CONFIGS)
def test_a_solved_head_is_the_solvers_answer_to_what_enters_it_in_the_quantized_model(name):
    blocks_only = run(name, GPTQ_METHOD).model
    W = head_of(blocks_only)[1].weight
    direct = GPTQ_METHOD.solver.solve(W.clone(), moments(enters_head(blocks_only, tokens().ids)), GRID).quantized
    both = run(name, GPTQ_METHOD, "solve")
    key, head = head_of(both.model)
    assert close(both.weights[key].codes, direct.codes)
    assert torch.equal(head.weight, both.weights[key].dequantize())
    for other, weight in both.weights.items():  # nothing else has changed
        if other != key:
            assert torch.equal(weight.dequantize(), matrix(blocks_only.get_submodule(other)))


def test_without_error_propagation_a_head_is_calibrated_on_full_precision():
    full = tiny_model("llama")
    direct = GPTQ().solve(full.lm_head.weight.clone(), moments(enters_head(full, tokens().ids)), GRID).quantized
    ours = run("llama", Method("gptq", GPTQ(), error_propagation=False), "solve").weights["lm_head"]
    assert close(ours.codes, direct.codes)


def test_a_solver_that_compares_with_full_precision_gets_the_heads_cross_moments():
    full, method = tiny_model("llama"), Method("qronos", Qronos())
    seen = moments(enters_head(run("llama", method).model, tokens().ids), enters_head(full, tokens().ids))
    direct = Qronos().solve(full.lm_head.weight.clone(), seen, GRID).quantized
    assert close(run("llama", method, "solve").weights["lm_head"].codes, direct.codes)


def test_padding_counts_in_no_head():
    mask = torch.arange(32).expand(6, 32) < 24
    data = make_token_set("padded", tiny_tokens(6, 32), mask, "test")
    row = run("llama", GPTQ_METHOD, "solve", data=data).ledger[-1]
    assert (row["name"], row["block"], row["tokens"]) == ("lm_head", -1, 6 * 24)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq_gptq", "qronos", "quarot", "gptq_distill", "best"])
def test_every_preset_solves_a_head_and_8_bits_of_it_change_little(method):
    model = tiny_model("llama")
    expected = model(tiny_tokens()).logits
    done = quantize_model(model, tokens(), method, bits=8, group_size=16, settings=SMALL, head="solve")
    assert done.ledger[-1]["name"] == "lm_head"
    assert done.ledger[-1]["solver"] == load_method(method)[0].solver.name
    assert torch.equal(model.lm_head.weight, done.weights["lm_head"].dequantize())
    assert relative_error(model(tiny_tokens()).logits, expected) < 0.02


def test_gptq_lowers_a_heads_error_and_rtn_needs_no_data():
    row = run("llama", GPTQ_METHOD, "solve").ledger[-1]
    assert row["error_after"] < row["error_before"]
    model = tiny_model("llama")
    own = model.lm_head.weight.clone()
    nearest = RTN().solve(own, None, GRID).quantized.dequantize()
    done = quantize_model(model, None, Method("rtn", RTN()), grid=GRID, head="solve")
    assert torch.equal(model.lm_head.weight, nearest)
    assert done.ledger[-1]["weight_error"] == pytest.approx(float(((nearest - own).norm() / own.norm()) ** 2), rel=1e-5)


def test_a_head_that_is_rounded_takes_the_grid_without_its_search_by_hessian():
    done = run("llama", GPTQ_METHOD, "rtn", IntGrid(3, 32, search="hessian"))
    nearest = RTN().solve(tiny_model("llama").lm_head.weight, None, IntGrid(3, 32)).quantized
    assert done.weights["lm_head"].sha256() == nearest.sha256()
    assert (done.ledger[0]["name"], done.ledger[0]["solver"]) == ("lm_head", "rtn")


# ------------------------------------------------------------------------------------------------------ tied heads


def test_a_tied_head_is_left_alone_unless_it_may_be_untied():
    with pytest.raises(UserError, match=r"head=solve: GPT2LMHeadModel's .* untie_head=true .*4096 more weights"):
        quantize_model(tiny_model("gpt2"), tokens(), "gptq", head="solve")
    model = tiny_model("gpt2")
    embedding = model.transformer.wte.weight.clone()
    quantize_model(model, tokens(), GPTQ_METHOD, grid=GRID, settings=SMALL, head="solve", untie_head=True)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("head", "untie", "says"), [("all", False, "one of rtn, solve or null"), (None, True, "head=solve")]
)
def test_words_that_mean_nothing_are_refused(head, untie, says):
    with pytest.raises(UserError, match=says):
        replace(GPTQ_METHOD, head=head, untie_head=untie)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bytes_of_a_quantized_head_are_counted_and_those_of_a_copy_too(name):
    before = sum(p.numel() for p in tiny_model(name).parameters())
    done = run(name, GPTQ_METHOD, "solve", IntGrid(4, 32, scale_dtype="float16"))
    footprint = Footprint()
    footprint.add(done.weights)
    copied = 64 * 64 if name == "gpt2" else 0
    quantized = sum(w.codes.numel() for w in done.weights.values())
    assert footprint.bits_per_weight == pytest.approx(4 + 20 / 32)
    assert footprint.model_bytes(done.model) == pytest.approx(
        quantized * (4 + 20 / 32) / 8 + 2 * (before + copied - quantized)
    )


# ---------------------------------------------------------------------------------------------------------- grids


def test_each_choice_of_grids_has_one_for_a_head_that_is_asked_for():
    model = tiny_model("llama")
    by_name = PerLayerGrid(4, 32, overrides={"lm_head": 8}, blocks={"-1": 3})
    assert assign_grids(model, by_name, "solve")["lm_head"].bits == 8
    assert assign_grids(model, replace(by_name, overrides={}), "solve")["lm_head"].bits == 4
    with pytest.raises(UserError, match=r"overrides\.lm_head: the model has no such linear"):
        assign_grids(model, by_name)
    assert assign_grids(model, AllocatedGrid(choices=(2, 6, 3), group_size=32), "solve")["lm_head"].bits == 6
    assert "lm_head" not in assign_grids(model, LlamaMix("q4_0", embeddings=False))
    assert next(iter(assign_grids(model, LlamaMix("q4_0", embeddings=False), "solve"))) == "lm_head"
    assert "lm_head" not in assign_grids(model, GRID)


def test_a_mixs_embedding_is_rounded_and_its_head_solved():
    done = run("llama", GPTQ_METHOD, "solve", LlamaMix("q4_0"))
    solvers = {row["name"]: (row["solver"], row["tokens"]) for row in done.ledger if row["block"] == -1}
    assert solvers == {"model.embed_tokens": ("rtn", None), "lm_head": ("gptq", 192)}


# --------------------------------------------------------------------------------------------------------- resumed


def steps(method, journal=None, kill_after=None):
    """State and ledger; killed after so many steps."""
    model, rows, restored = tiny_model("llama"), {}, []
    for count, block in enumerate(quantize(model, tokens(), method, GRID, SMALL, progress=journal), start=1):
        rows |= {row["name"]: (row["codes_sha256"], row.get("error_after")) for row in block.rows}
        restored.append(block.restored)
        if count == kill_after:
            raise KilledError
    return model.state_dict(), rows, restored


@pytest.mark.parametrize("kill_after", [1, 2, 3])
@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "qronos", "awq_gptq"])
def test_a_run_killed_before_or_after_its_head_ends_as_an_uninterrupted_one(tmp_path, name, kill_after):
    method, journal = replace(load_method(name)[0], head="solve"), Journal(tmp_path / "j", "key")
    state, rows, _ = steps(method)
    with pytest.raises(KilledError):
        steps(method, journal, kill_after)
    again, rows_again, restored = steps(method, journal)
    assert restored == [True] * kill_after + [False] * (3 - kill_after)
    assert rows_again == rows
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_a_head_that_is_streamed_from_disk_gets_the_same_codes_and_holds_them(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(offloaded, "SMALL", 1)
    rows = {}
    for room in (None, 0):
        model, _ = load_folder(tiny_folder, "float32", "cpu", "model.path=here", room=room)
        journal = Journal(tmp_path / f"{room}", "key")
        for block in quantize(model, tokens(), replace(GPTQ_METHOD, head="solve"), GRID, SMALL, progress=journal):
            rows |= {(room, row["name"]): row["codes_sha256"] for row in block.rows}
            weights = block.weights
        with resident(model.lm_head):
            assert torch.equal(model.lm_head.weight, weights["lm_head"].dequantize())
    assert residence(model.lm_head) is not None
    assert all(rows[0, name] == found for (room, name), found in rows.items() if room is None)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


def test_checkpoints_hold_the_head_that_was_scored(tmp_path, cli, tiny):
    formats = ("gptq", "compressed_tensors", "mlx", "hf")
    options = ["method=gptq", "bits=4", "sym=true", "group_size=32", "head=solve"]
    done = cli(*tiny, *options, f"export.formats=[{','.join(formats)}]", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    for form in formats:
        folder = tmp_path / "out" / "checkpoints" / form
        assert "lm_head" in json.loads((folder / "verification.json").read_text())["weights"]
        quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
        assert quantization.get("lm_head") is (True if form == "gptq" else None)
        assert "lm_head" not in quantization.get("ignore", [])
    ledger = results.read_ledger(tmp_path / "out" / "ledger.jsonl")
    assert list(ledger["name"])[-1] == "lm_head"


@pytest.mark.parametrize("form", ["awq", "bnb"])
def test_formats_whose_readers_want_a_plain_head_refuse_before_calibration(form, tmp_path, cli, tiny):
    grid = ["bits=4", "group_size=32"] if form == "awq" else ["bits=8", "group_size=-1", "sym=true"]
    done = cli(*tiny, "method=gptq", *grid, "head=solve", f"export.formats=[{form}]", f"out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "choose head=null" in done.stderr


def test_a_tied_head_is_refused_on_the_command_line_and_untied_on_request(gpt2_folder, tmp_path, cli, tiny):
    own = [argument for argument in tiny if not argument.startswith("model.path")] + [f"model.path={gpt2_folder}"]
    refused = cli(*own, "method=rtn", "head=solve", f"out={tmp_path / 'no'}")
    assert refused.returncode != 0
    assert "untie_head=true" in refused.stderr
    rows = {}
    for name, options in {"plain": [], "head": ["head=solve", "untie_head=true"]}.items():
        done = cli(*own, "method=gptq", *options, f"out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        rows[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert rows["head"]["baseline_size_bytes"] == rows["plain"]["baseline_size_bytes"]
    assert rows["head"]["size_bytes"] > rows["plain"]["size_bytes"]  # the copy, in 4 bits and a bit more
    assert 0 < rows["plain"]["metrics"]["tiny/kl"] < rows["head"]["metrics"]["tiny/kl"]
