"""MLX folders: bit layout, exactness, refusals; mlx-lm itself where it is installed."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.mlx_logits import mlx_logits
from helpers.quantized_weights import assert_decodes, rounded_source
from helpers.tiny_models import CONFIGS, tiny_model, tiny_tokens

import gptq_awq.export.mlx as mlx_format
from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.export import engine_check
from gptq_awq.export.base import Format, LinearSpec, linear_specs
from gptq_awq.export.config import legacy_config
from gptq_awq.export.mlx import BITS, GROUPS, MLXFormat, pack, quantization_config
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.solvers.rtn import RTN

LLAMA = SimpleNamespace(model_type="llama")


def known_model(name):
    """A tiny model that mlx-lm has a class for."""
    model = tiny_model(name)
    if name == "gpt-neox":  # mlx-lm has no other MLP than four times as wide
        model = type(model)(type(model.config)(**model.config.to_dict() | {"intermediate_size": 256})).eval()
    return model.requires_grad_(False)


def rounded(grid, rows=24, columns=256, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02
    return RTN().solve(weight, None, grid).quantized


def grids():
    for group in GROUPS:
        for bits in BITS:
            yield AffineGrid(bits, group)
            yield AffineGrid(bits, group, scale_dtype="bfloat16")
            yield AffineGrid(bits, group, scale_dtype="float32")
            yield IntGrid(bits, group, sym=True, scale_dtype="float16")
            yield IntGrid(bits, group, sym=True, scale_dtype="bfloat16")
            yield IntGrid(bits, group, scale_dtype="float16")
            yield SignedGrid(bits, group)
        yield TernaryGrid(group)


@pytest.fixture(params=["own reader", "mlx"])
def reader(request):
    if request.param == "mlx":
        pytest.importorskip("mlx.core")
        return mlx_format._decode_with_mlx
    return mlx_format._decode


def test_a_format_is_what_exports_expect():
    assert isinstance(MLXFormat(), Format)


@pytest.mark.parametrize("bits", BITS)
def test_code_i_lies_at_bit_i_times_bits_of_a_row_read_as_one_little_endian_number(bits):
    weight = rounded(AffineGrid(bits, 32), rows=3, columns=64)
    words = pack(weight, torch.float16)["weight"]
    assert words.dtype == torch.uint32
    assert words.shape == (3, 64 * bits // 32)
    for row, codes in zip(words.numpy(), weight.codes.tolist(), strict=True):
        number = int.from_bytes(row.astype("<u4").tobytes(), "little")
        assert [number >> (i * bits) & (2**bits - 1) for i in range(64)] == codes


@pytest.mark.parametrize("grid", list(grids()), ids=str)
def test_packing_then_independent_unpacking_gives_codes_and_weights_bit_for_bit(grid, reader):
    weight, dtype = rounded(grid), getattr(torch, mlx_format.exact_dtype(grid))
    parts = pack(weight, dtype)
    assert parts["scales"].dtype == parts["biases"].dtype == dtype
    codes, dequantized = reader(parts, mlx_format.stored_bits(grid), grid.group_size)
    assert torch.equal(codes, weight.codes)
    assert torch.equal(dequantized, weight.dequantize())


@pytest.mark.parametrize("grid", [AffineGrid(4, 32), IntGrid(3, 32, scale_dtype="float16"), SignedGrid(8, 32)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_a_folder_decodes_to_what_was_in_memory(name, grid, tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr(mlx_format, "_has_mlx", lambda: False)
    source = rounded_source(known_model(name), grid)
    assert_decodes(MLXFormat(), source, tmp_path)
    plain = MLXFormat().plain(tmp_path)
    state = source.model.state_dict()
    assert plain.keys() <= state.keys()
    assert not {f"{key}.weight" for key in source.weights} & plain.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor.float(), state[key].float(), atol=1e-3, rtol=1e-3)


def test_auto_takes_the_shortest_exact_dtype(tmp_path):
    for grid, dtype in (
        (AffineGrid(4, 32), "float16"),
        (AffineGrid(4, 32, scale_dtype="bfloat16"), "bfloat16"),
        (IntGrid(4, 32, sym=True, scale_dtype="float16"), "float16"),
        (IntGrid(4, 32, scale_dtype="float16"), "float32"),
    ):
        MLXFormat().write(rounded_source(tiny_model("llama"), grid), tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_modules_with_sizes_of_their_own_are_named_in_the_config():
    usual, other = AffineGrid(4, 64), SignedGrid(8, 32)
    config = quantization_config({"a": usual, "b": usual, "c": other})
    assert config == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "c": {"group_size": 32, "bits": 8, "mode": "affine"},
    }


def test_rotary_options_lie_where_mlx_looks():
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    found = legacy_config({"model_type": "llama", "rope_parameters": scaled, "rope_scaling": None})
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == scaled | {"type": "llama3"}
    plain = legacy_config({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})
    assert plain["rope_theta"] == 1e5
    assert "rope_scaling" not in plain
    gemma = legacy_config(CONFIGS["gemma3"]().to_dict())
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["sliding_window_pattern"]) == (1e6, 1e4, 2)
    assert legacy_config({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}})["rope_theta"] == 1.0


@pytest.mark.parametrize(
    ("format_", "grid", "columns", "hint"),
    [
        (MLXFormat(), AffineGrid(7, 32), 64, "bits=6 or bits=8"),
        (MLXFormat(), AffineGrid(4, -1), 64, "choose 64"),
        (MLXFormat(), AffineGrid(4, 16), 96, "choose 32"),
        (MLXFormat(), AffineGrid(4, 64), 288, "group_size=32"),
        (MLXFormat(), AffineGrid(4, 32), 72, r"export.formats=\[hf\]"),
        (MLXFormat(), TableGrid("nf4", 64), 64, "grid=affine"),
        (MLXFormat(), KGrid("q4_k"), 256, "grid=affine"),
        (MLXFormat(), IntGrid(4, 64), 64, "grid.scale_dtype=float16"),
        (MLXFormat("float16"), IntGrid(4, 64, scale_dtype="float16"), 64, "export.mlx.dtype=float32 or grid=affine"),
        (MLXFormat("float16"), AffineGrid(4, 64, scale_dtype="bfloat16"), 64, "export.mlx.dtype=bfloat16"),
        (MLXFormat("bfloat16"), SignedGrid(4, 64), 64, "export.mlx.dtype=float16"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_would_is_named(format_, grid, columns, hint):
    with pytest.raises(UserError, match=hint):
        format_.check([LinearSpec("layer", 64, columns, grid)], LLAMA)


def test_scattered_groups_are_refused():
    fitting = LinearSpec("layer", 64, 64, AffineGrid(4, 64))
    MLXFormat().check([fitting], LLAMA)
    with pytest.raises(UserError, match="static_groups=true"):
        MLXFormat().check([LinearSpec("layer", 64, 64, AffineGrid(4, 64), natural_order=False)], LLAMA)
    with pytest.raises(UserError, match=r"MLXFormat\.dtype=int8"):
        MLXFormat("int8")


def test_a_bias_that_overflows_is_refused_not_rounded():
    weight = rounded(IntGrid(8, 32, sym=True, scale_dtype="float16"))
    weight.scales[0, 0] = 2.0**10  # times 128 is beyond 65504
    with pytest.raises(UserError, match=r"export\.mlx\.dtype=float32"):
        pack(weight, torch.float16)
    assert pack(weight, torch.float32)["biases"][0, 0] == -(2.0**17)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "opt" not in name])
def test_mlx_lm_computes_the_logits_of_the_model_in_memory(name, tmp_path):
    pytest.importorskip("mlx_lm")
    source = rounded_source(known_model(name), AffineGrid(4, 32))
    MLXFormat("float32").write(source, tmp_path)
    tokens = tiny_tokens(2, 24)
    torch.testing.assert_close(mlx_logits(tmp_path, tokens), source.model(tokens).logits, atol=2e-5, rtol=0)


def tried(model, grid=AffineGrid(4, 32)):  # noqa: B008 (frozen)
    linears = linear_specs(
        model, dict.fromkeys(quantize_model(copy.deepcopy(model), method="rtn", grid=grid).weights, grid), True
    )
    return MLXFormat().check_model(linears, model, None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3"])
def test_a_model_that_mlx_lm_computes_is_taken(name):
    pytest.importorskip("mlx_lm")
    assert tried(tiny_model(name)) == []


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_a_model_that_mlx_lm_does_not_know_is_refused_before_calibration(kind):
    pytest.importorskip("mlx_lm")
    with pytest.raises(UserError, match=rf"export\.formats=mlx: mlx refuses this .*{kind} not supported"):
        tried(tiny_architecture(kind))


def test_a_model_that_mlx_lm_computes_otherwise_is_refused():
    pytest.importorskip("mlx_lm")
    model = tiny_model("llama")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config = type(model.config)(**model.config.to_dict() | {"rope_parameters": yarn | {"attention_factor": 3.0}})
    torch.manual_seed(0)
    model = type(model)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5 if parameter.dim() == 2 else 1)
    with pytest.raises(UserError, match="mlx computes something else from this LlamaForCausalLM"):
        tried(model)


@pytest.mark.parametrize(("name", "ignored"), [("mistral+windows", True), ("gemma3_text", False), ("qwen2", False)])
def test_windows_beyond_what_is_compared_are_tried_too(name, ignored):
    pytest.importorskip("mlx_lm")
    model = tiny_architecture(name)
    model.config.sliding_window = 64
    told = [note for note in tried(model) if "sliding window of 64 tokens" in note]
    assert bool(told) == ignored
    assert model.config.sliding_window == 64


def test_that_a_model_was_not_tried_is_said(monkeypatch):
    monkeypatch.setattr(engine_check, "find", lambda *_: None)
    assert tried(tiny_model("llama")) == ["mlx: not tried in mlx before calibration, as mlx is not installed"]


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # a head of its own, and a tied one
def test_mlx_lm_takes_embeddings_and_heads_that_are_quantized(name, tmp_path):
    pytest.importorskip("mlx_lm")
    source = rounded_source(tiny_model(name), LlamaMix("q8_0"))
    assert any("embed" in module for module in source.weights)
    assert_decodes(MLXFormat("float32"), source, tmp_path)
    tokens = tiny_tokens(2, 24)
    torch.testing.assert_close(mlx_logits(tmp_path, tokens), source.model(tokens).logits, atol=2e-5, rtol=0)


def test_mlx_lm_scales_rotary_frequencies_as_we_do(tmp_path):
    pytest.importorskip("mlx_lm")
    model = tiny_model("llama")
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = type(model)(type(model.config)(**model.config.to_dict() | {"rope_parameters": scaled}))
    source = rounded_source(model.eval().requires_grad_(False), AffineGrid(4, 32))
    MLXFormat("float32").write(source, tmp_path)
    tokens = tiny_tokens(2, 64)
    torch.testing.assert_close(mlx_logits(tmp_path, tokens), source.model(tokens).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "grid", [AffineGrid(4, 32), IntGrid(4, 32, sym=True, scale_dtype="float16"), SignedGrid(8, 32)], ids=str
)
def test_mlx_lm_agrees_on_a_trained_model(grid, stories15m, tmp_path):
    pytest.importorskip("mlx_lm")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval().requires_grad_(False)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = AutoTokenizer.from_pretrained(stories15m)(text, return_tensors="pt")["input_ids"]
    source = rounded_source(model, grid)
    MLXFormat().write(source, tmp_path)
    ours, theirs = (x.double().log_softmax(-1) for x in (model(tokens).logits, mlx_logits(tmp_path, tokens)))
    assert (ours.exp() * (ours - theirs)).sum(-1).max() < 1e-4
