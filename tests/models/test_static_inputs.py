"""Laws of static input scales: scored is what compressed-tensors computes with the scales that a checkpoint stores."""

import json

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens
from safetensors.torch import load_file

from gptq_awq.calibration.input_statistics import input_statistics
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.export.compressed_floats import activation_scheme, input_scales
from gptq_awq.grids.dynamic import DynamicFloat4, DynamicFP8, DynamicGrid, DynamicInt, Unrounded
from gptq_awq.models.activations import check_activations, quantized_activations
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear

STATIC = {"int8": DynamicInt(8, static=True), "fp8": DynamicFP8(static=True), "nvfp4": DynamicFloat4(static=True)}
each = pytest.mark.parametrize("name", STATIC)


def draws(largest: float = 3.0):
    """Rows of various sizes, some beyond the largest, one all zero, one whose groups are very unlike."""
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0.5, 24)[:, None]
    x[3], x[7, 0] = 0.0, 2 * largest
    x[9, :16] *= 1e-6
    return x


def library_rounds(x, name, largest):
    """Rounded by compressed-tensors, as an engine does that reads a checkpoint's config and scales."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp  # pyright: ignore

    args = QuantizationArgs.model_validate(activation_scheme(name, static=True))
    stored = input_scales(name, True, largest)
    if name != "nvfp4":
        return fake_quantize(x, stored["input_scale"], torch.zeros(1), args)
    whole = stored["input_global_scale"]
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=whole)
    return fake_quantize(x, scale, zero, args, global_scale=whole)


@each
def test_rounded_are_the_numbers_that_compressed_tensors_computes(name):
    for largest in (3.0, 0.37, 41.0):
        x = draws(largest)
        found, expected = STATIC[name].rounded(x, largest), library_rounds(x, name, largest)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@each
def test_what_exceeds_the_largest_of_calibration_is_clamped_to_it(name):
    x = torch.full((2, 32), 5.0)
    x[1] = -70.0
    top = 3.0 * 128 / 127 if name == "int8" else 3.0
    torch.testing.assert_close(STATIC[name].rounded(x, 3.0), torch.tensor([[3.0], [-top]]).expand(2, 32))


@each
def test_every_linear_rounds_by_its_own_largest_input(name):
    model, tokens, seen = tiny_model("llama"), tiny_tokens(), {}
    prefix, blocks = find_blocks(model)
    linears = {f"{prefix}.{each}": module for each, module in blocks.named_modules() if is_linear(module)}
    largest = {each: 0.5 + 0.1 * number for number, each in enumerate(linears)}

    def keep(which):
        return lambda _module, args: seen.setdefault(which, []).append(args[0])

    def watched():
        return hooks([module.register_forward_pre_hook(keep(each)) for each, module in linears.items()])

    with torch.no_grad(), watched(), quantized_activations(model, STATIC[name], Unrounded(), largest), watched():
        model(tokens, use_cache=False)
    for each, (raw, rounded) in seen.items():
        assert torch.equal(rounded, STATIC[name].rounded(raw, largest[each]))


@each
def test_without_a_largest_nothing_is_rounded_silently(name):
    model = tiny_model("llama")
    check_activations(model, STATIC[name], Unrounded())
    line = r"act\.static=true: scales come from calibration"
    with pytest.raises(UserError, match=line), quantized_activations(model, STATIC[name], Unrounded()):
        model(tiny_tokens(), use_cache=False)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: DynamicInt(8, sym=False, static=True),
            r"beside act\.sym=false; take act\.sym=true",
        ),
        (lambda: DynamicInt(8, group_size=32, static=True), r"beside act\.group_size=32; take act\.group_size=-1"),
        (lambda: DynamicFP8(group_size=32, static=True), r"beside act\.group_size=32; take act\.group_size=-1"),
        (lambda: DynamicFloat4("e8m0", static=True), r"beside act=mxfp4, .* take act=nvfp4"),
    ],
)
def test_what_has_no_static_scale_is_refused(make, line):
    with pytest.raises(UserError, match=line):
        make()


def scored(cli, tiny, out, *options):
    own = [option for option in tiny if not option.startswith(("group_size=", "sym="))]
    done = cli(*own, *options, f"out={out}")
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def test_a_run_scores_with_the_scales_that_its_checkpoint_holds(cli, tiny, tmp_path):
    """The scales in the file are those of the full-precision model's largest inputs, and the row says static."""
    options = (
        *("method=rtn", "grid=fp8", "act=fp8", "act.static=true", "export.formats=[compressed_tensors]"),
        *("export.compressed_tensors.dtype=float32",),
        *("export.compressed_tensors.activations=fp8", "export.compressed_tensors.static=true"),
    )
    row = scored(cli, tiny, tmp_path / "static", *options)
    assert row["act"] == "fp8 static"
    assert row["metrics"]["tiny/kl"] > 0
    folder = tmp_path / "static/checkpoints/compressed_tensors"
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)
    scales = [name for name in tensors if name.endswith(".input_scale")]
    assert len(scales) == sum(name.endswith(".weight_scale") for name in tensors)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("method=awq", "act=int8", "act.static=true"),
            "act.static=true: static scales are of",
        ),
        (("method=rtn", "kv=fp8", "+kv.static=true"), "kv.static=true: a cache's scales are each token's own"),
        (
            ("method=rtn", "grid.search=hessian", "act=int8", "act.static=true", "data.imatrix=."),
            "act.static=true: an importance matrix holds no largest inputs",
        ),
        (("method=rtn", "act=int8", "act.static=true", "act.group_size=16"), "take act.group_size=-1"),
    ],
)
def test_static_scales_that_calibration_cannot_know_are_refused_in_one_line(cli, tiny, tmp_path, options, line):
    done = cli(*tiny, *options, f"out={tmp_path / 'refused'}")
    assert done.returncode != 0
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_largest_input_is_that_of_the_text():
    model, ids = tiny_model("llama"), tiny_tokens()
    tokens = TokenSet("text", ids, None, "drawn", "")
    largest = {name: own.largest for name, own in input_statistics(model, tokens).items()}
    grid: DynamicGrid = DynamicInt(16, static=True)
    with quantized_activations(model, grid, Unrounded(), largest), torch.no_grad():
        near = model(ids, use_cache=False).logits
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    assert float((near - full).norm() / full.norm()) < 1e-3
