"""A rotated model is the same model, in a basis without outliers."""

import json
import shutil

import pytest
import torch
from helpers.interrupted_runs import KilledError, run, same
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.quantized_weights import NoTokenizer
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gptq_awq import quantize_model
from gptq_awq.api import load_method
from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.export.hf import HFFormat
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.embeddings import untie
from gptq_awq.models.topology import relative_error
from gptq_awq.numerics.hadamard import hadamard
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import needs_calibration
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.storage.journal import Journal
from gptq_awq.transforms.quarot import QuaRot, Rotation

POST_NORM = ("gemma3", "opt-post-norm")
ROTATED = [name for name in CONFIGS if name not in POST_NORM]


def signs(n):
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(1)).mul(2).sub(1).float()


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", ROTATED)
def test_rotation_leaves_logits_unchanged(name, heads):
    model = tiny_model(name)
    before, weights = model(tiny_tokens()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    details = QuaRot(heads=heads).prepare(model)
    assert relative_error(model(tiny_tokens()).logits, before) < 1e-4
    assert details["order"] == 64
    assert details["heads_order"] == (16 if heads else 0)
    for key, weight in model.state_dict().items():  # everything of two dimensions has changed
        if weight.dim() == 2 and key in weights and ("k_proj" not in key or heads):
            assert not torch.allclose(weight, weights[key], atol=1e-3), key


@pytest.mark.parametrize("name", POST_NORM)
def test_what_does_not_commute_with_a_rotation_is_refused_and_left_as_it_was(name):
    model, before = tiny_model(name), tiny_model(name).state_dict()
    with pytest.raises(UserError, match="method"):
        QuaRot(heads=False).prepare(model)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("n", [4, 12, 64])
def test_q_is_the_signed_hadamard_matrix(n):
    expected = torch.diag(signs(n)) @ hadamard(n) / n**0.5
    torch.testing.assert_close(Rotation(signs(n))(torch.eye(n)), expected)


@pytest.mark.parametrize("n", [2, 12, 64, 768])
def test_a_rotation_that_keeps_the_mean_is_orthogonal_and_still_spreads(n):
    Q = Rotation(signs(n).double(), mean_kept=True)(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(Q.sum(1), torch.ones(n, dtype=torch.float64))
    assert n < 64 or Q.abs().max() < 4 * n**-0.5


def test_a_hadamard_matrix_of_order_1_is_the_identity():
    x = torch.randn(3, 7)
    torch.testing.assert_close(Rotation(torch.ones(7))(x), x)


def test_rotation_is_deterministic_and_its_seed_matters():
    def prepared(seed):
        model = tiny_model("llama")
        QuaRot(seed=seed).prepare(model)
        return model.state_dict()

    first, again, other = prepared(0), prepared(0), prepared(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_outliers_of_one_channel_are_spread_over_all():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    blocks[0].self_attn.q_proj.weight[:, 5] *= 50
    QuaRot().prepare(model)
    W = blocks[0].self_attn.q_proj.weight
    assert float(W.abs().max() / W.square().mean().sqrt()) < 6


@pytest.mark.parametrize("preset", ["quarot", "quarot_rtn"])
@pytest.mark.parametrize("name", ROTATED)
def test_presets_run(name, preset):
    result = quantize_model(tiny_model(name), tiny_tokens(), preset, bits=8, group_size=32, settings=SMALL)
    assert relative_error(result.model(tiny_tokens()).logits, tiny_model(name)(tiny_tokens()).logits) < 0.05
    assert all(row["transforms"]["quarot"]["order"] == 64 for row in result.ledger)


def test_rounding_to_nearest_after_a_rotation_needs_no_data():
    assert not needs_calibration(load_method("quarot_rtn")[0], GRID)
    quantize_model(tiny_model("llama"), None, "quarot_rtn")


def test_it_composes_with_awq_whatever_the_order():
    awq, quarot = load_method("awq")[0].transforms, {"quarot": QuaRot()}
    grid, expected = IntGrid(8, 32), tiny_model("llama")(tiny_tokens()).logits
    states = []
    for transforms in (quarot | awq, awq | quarot):
        result = quantize_model(
            tiny_model("llama"), tokens(), Method("both", GPTQ(), transforms), grid=grid, settings=SMALL
        )
        assert relative_error(result.model(tiny_tokens()).logits, expected) < 0.02
        assert "alpha" in result.ledger[0]["transforms"]["awq"]
        states.append(result.model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_killed_run_goes_on_after_the_rotation(tmp_path, name):
    method = load_method("quarot")[0]
    plain, journal = run(method, name), Journal(tmp_path / "j", "key")
    with pytest.raises(KilledError):
        run(method, name, journal, kill_after=0)
    assert same(run(method, name, journal), plain)


def tied() -> LlamaForCausalLM:
    config = LlamaConfig(**CONFIGS["llama"]().to_diff_dict() | {"tie_word_embeddings": True})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("model", [tied, lambda: tiny_model("gpt2"), lambda: tiny_model("qwen3")])
def test_an_exported_rotated_model_is_the_one_in_memory_also_where_the_head_was_tied(tmp_path, model):
    model = model()
    result = quantize_model(model, tokens(), "quarot_rtn", grid=IntGrid(4, 32), settings=SMALL)
    HFFormat("float32").write(Source(model, NoTokenizer(), "tiny", result.weights), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_untying_changes_no_logit():
    model = tied()
    before = model(tiny_tokens()).logits
    untie(model)
    assert torch.equal(model(tiny_tokens()).logits, before)
    assert not model.config.tie_word_embeddings


def test_a_run_scores_and_exports_a_rotated_model_with_a_tied_head(cli, tiny, tiny_folder, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(tiny_folder, folder)
    tied().save_pretrained(folder)
    done = cli(
        *tiny, f"model.path={folder}", "method=quarot", "bits=8", "sym=true", "group_size=32",
        "export.formats=[hf,gptq]", "out=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "results.json").read_text())
    assert row["metrics"]["tiny/kl"] < 1e-3
    assert {"hf", "gptq"} == set(row["manifest"]["checkpoints"])
    assert row["baseline_size_bytes"] == Footprint().model_bytes(tied())
    for name in ("hf", "gptq"):
        assert (tmp_path / "run" / "checkpoints" / name / "verification.json").exists()
