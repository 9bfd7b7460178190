"""Laws of placement, on a simulated GPU: everything is where it is used, nothing is fetched from it without need."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.device_rules import MixedDevicesError
from helpers.forked import call
from helpers.paths import ROOT
from helpers.scored_models import windows
from helpers.simulated_accelerator import OnDevice, accelerator
from helpers.tiny_models import tiny_model, tiny_tokens
from torch import nn

from gptq_awq import quantize_model
from gptq_awq.api import load_method
from gptq_awq.data.tokens import make_token_set
from gptq_awq.evaluation.evaluate import full_precision, score
from gptq_awq.quantization.quantize import Settings

PROGRAM = ROOT / "tests" / "helpers" / "on_accelerator.py"
WAITS_FOR_A_LINEAR = 25
"""Numbers that the host reads for a linear: its ledger's errors, the checks of its scales, its share of a site's."""


def one_block(name: str = "llama") -> nn.Module:
    model = tiny_model(name)
    if hasattr(model, "model"):
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
    return model


def calibration(rows: int = 2):
    return make_token_set("tiny", tiny_tokens(rows, 48), None, "test")


def quantized(method: str, device: str, compute_dtype: str = "float32", name: str = "llama", rows: int = 2, **options):
    given, grid = load_method(method, **options)
    settings = Settings(compute_dtype=compute_dtype, tokens_per_batch=96)
    return quantize_model(one_block(name).to(device), calibration(rows), given, grid=grid, settings=settings)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3, 4),
        lambda x: x @ torch.ones(4),
        lambda x: torch.cat([x, torch.ones(1, 4)]),
        lambda x: torch.ones(3, 4).add_(x),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: torch.ones(5)[torch.arange(2, device="cuda")],
        lambda x: torch.ones(5, 4).index_select(0, torch.arange(2, device="cuda")),
        lambda x: nn.functional.embedding(torch.arange(2), x),
        lambda x: nn.Linear(4, 2)(x),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    ],
)
def test_what_mixes_devices_is_refused(wrong):
    with accelerator(), pytest.raises(MixedDevicesError):
        wrong(torch.ones(3, 4, device="cuda"))


def test_what_needs_the_values_on_the_host_is_refused():
    with accelerator():
        x = torch.ones(3, device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        assert torch.equal(x.cpu(), torch.ones(3))


def test_what_pytorch_lets_in_is_computed_on_the_device():
    with accelerator() as asked:
        x = torch.arange(4.0).to("cuda")
        for y in (x * torch.tensor(2.0), x[torch.tensor([0, 2])], x.new_zeros(2), torch.where(x > 1, 0.0, x)):
            assert y.device == torch.device("cuda", 0)
            assert isinstance(y, OnDevice)
        before = asked.waits
        assert float(x.sum()) == 6
        assert x.tolist() == [0, 1, 2, 3]
        assert len(x.cpu()) == 4
        assert (asked.uploads, asked.waits - before) == (1, 3)


def test_a_module_moves_with_its_parameters_and_learns_there():
    with accelerator():
        layer = nn.Linear(4, 2)
        expected = layer(torch.ones(3, 4)).sum()
        moved = copy.deepcopy(layer.to("cuda"))
        assert isinstance(moved.weight, nn.Parameter)
        total = moved(torch.ones(3, 4, device="cuda")).sum()
        total.backward()
        assert moved.weight.grad.device.type == "cuda"
        assert torch.allclose(total.cpu(), expected)
        assert torch.equal(moved.weight.grad.cpu(), torch.full((2, 4), 3.0))


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        "hqq",
        "awq_gptq",
        "smoothquant",
        "gptaq",
        "fast",
        "quarot",
        "best",
        "yaqa",
        "gptq_distill",
        "yaqa_distill",
    ],
)
def test_every_method_gives_the_codes_on_a_gpu_that_it_gives_on_a_cpu(method):
    options = {} if method == "hqq" else {"bits": 4, "group_size": 32}
    if method in ("fast", "yaqa", "yaqa_distill"):  # column by column where there is no compiled kernel
        options["options"] = {"refine": 1}
    if method == "yaqa_distill":  # what it writes is likeliest, so that both write the same
        options["options"] |= {"self_calibration.windows": 2, "prompt": 8, "temperature": 1e-4}
    theirs = quantized(method, "cpu", **options).weights
    with accelerator() as asked:
        ours = quantized(method, "cuda", **options)
        assert next(ours.model.parameters()).device.type == "cuda"
        codes = {name: weight.codes.cpu() for name, weight in ours.weights.items()}
    assert asked.uploads > 0
    agree = [float((codes[name] == theirs[name].codes).float().mean()) for name in theirs]
    assert min(agree) > 0.98  # sums in another order may move a tie


@pytest.mark.parametrize(
    ("grid", "name"),
    [("nf4", "llama"), ("q4_k_m", "llama"), ("iq4_nl", "llama"), ("nvfp4", "llama"), ("int", "mixtral")],
)
def test_other_grids_and_models_are_quantized_on_a_gpu_in_its_dtype(grid, name):
    with accelerator():
        done = quantized("gptq", "cuda", "bfloat16", name, grid=grid)
        assert all(torch.isfinite(p).all() for p in done.model.parameters())


def test_a_gpu_is_waited_for_a_number_of_times_that_depends_on_linears_only():
    counts = {}
    for rows in (2, 4):
        with accelerator() as asked:
            quantized("gptq", "cuda", rows=rows, bits=4, group_size=32)
            counts[rows] = asked.waits
    batches = (4 - 2) // 2
    assert counts[4] - counts[2] <= 12 * batches  # of checks that blocks can be called one by one
    assert counts[2] <= 7 * WAITS_FOR_A_LINEAR


def test_scores_are_taken_on_the_gpu():
    metrics = {}
    for device in ("cpu", "cuda"):
        with accelerator():
            model = one_block().to(device)
            baseline = full_precision(model, None, "x", [windows(2)], compute_dtype="float32")
            model.model.layers[0].mlp.down_proj.weight.mul_(1.1)
            metrics[device] = score(model, None, baseline).metrics
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ("method=gptq", "bits=4", "sym=true", "group_size=32", "export.formats=[gptq,compressed_tensors,hf]"),
        pytest.param(
            (
                "method=awq",
                "grid=q4_0",
                "stream=true",
                "head=rtn",
                "export.formats=[hf]",
                "act=int8",
                "kv=int8",
                "eval=tails",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_whole_run_is_done_on_the_gpu(options, tiny, tmp_path, cache, forks):
    small = [each for each in tiny if not each.startswith(("group_size", "sym"))]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n")
    environment = os.environ | {
        "GPTQ_AWQ_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROGRAM.parents[1]),
    }
    small += ["data.samples=4", "eval.perplexity.windows=4"]
    given = [*options, *small, f"eval.samples={prompts}", "device=cuda", "resume=false", f"out={tmp_path / 'out'}"]
    done = call(PROGRAM, given, environment, Path(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["status"] == "done"
    assert 0 <= row["metrics"]["tiny/kl"] < 0.1
    asked = json.loads(done.stderr.strip().splitlines()[-1])
    assert asked["waits"] >= asked["downloads"] > 0
