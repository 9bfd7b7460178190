"""compressed-tensors checkpoints: the library and our own reader find the very codes and weights."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.architectures import tiny_architecture
from helpers.quantized_weights import (
    NoTokenizer,
    assert_decodes,
    assert_same,
    from_codes,
    int_grid,
    quantized,
    rounded_source,
    save_packed,
    source_specs,
    specs,
    tiny_source,
)
from helpers.tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from gptq_awq import quantize_model
from gptq_awq.calibration.input_statistics import InputStatistics
from gptq_awq.errors import UserError
from gptq_awq.export import compressed_tensors
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Source
from gptq_awq.export.compressed_tensors import (
    CompressedTensorsFormat,
    library_reads,
    pack,
    pack_int8,
    quantization_config,
)
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import Probe, verify
from gptq_awq.export.write import Exports
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.per_layer import PerLayerGrid
from gptq_awq.models.unfuse import unfuse
from gptq_awq.runtime.progress import no_track

LLAMA = LlamaConfig()
READERS = ("library", "own")


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Decode with the library, then with our own reader."""
    if request.param == "library" and not library_reads():
        pytest.skip("compressed-tensors 0.18 or newer is not installed")
    monkeypatch.setattr(compressed_tensors, "library_reads", lambda: request.param == "library")
    return request.param


@pytest.mark.parametrize("order", ["natural", "static_groups"])
@pytest.mark.parametrize("group_size", [-1, 16, 48])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_then_independent_unpacking_gives_the_codes(bits, sym, group_size, order, reader, tmp_path):
    grid = int_grid(bits, group_size, sym)
    weight = quantized(grid, order, rows=33)
    save_packed(tmp_path, pack(weight, torch.float16), quantization_config({"lin": grid}, "pack-quantized", []))
    (decoded,) = CompressedTensorsFormat().decode(tmp_path)
    assert_same(decoded, weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [-1, 48])
@pytest.mark.parametrize("sym", [True, False])
def test_bytes_give_the_codes(sym, group_size, dtype, reader, tmp_path):
    grid = int_grid(8, group_size, sym, dtype)
    weight = quantized(grid, rows=33)
    save_packed(
        tmp_path, pack_int8(weight, getattr(torch, dtype)), quantization_config({"lin": grid}, "int-quantized", [])
    )
    (decoded,) = CompressedTensorsFormat().decode(tmp_path)
    assert_same(decoded, weight)


def test_widths_that_fill_no_words_are_padded(reader, tmp_path):
    grid = int_grid(3, -1)
    weight = quantized(grid, rows=7, columns=13)
    save_packed(tmp_path, pack(weight, torch.float16), quantization_config({"lin": grid}, "pack-quantized", []))
    (decoded,) = CompressedTensorsFormat().decode(tmp_path)
    assert_same(decoded, weight)


def test_tensors_are_those_worked_out_by_hand():
    weight = from_codes([[1, 2, 3, 4, 5, 6, 7, 8]] * 8, int_grid(4, -1), scale=0.5, zero=range(1, 9))
    packed = pack(weight, torch.float16)
    assert [word & 0xFFFFFFFF for word in packed["weight_packed"].flatten().tolist()] == [0x87654321] * 8
    assert [word & 0xFFFFFFFF for word in packed["weight_zero_point"].flatten().tolist()] == [0x87654321]
    assert packed["weight_zero_point"].shape == (1, 1)
    assert packed["weight_shape"].tolist() == [8, 8]
    assert torch.equal(packed["weight_scale"], torch.full((8, 1), 0.5, dtype=torch.float16))
    octets = pack_int8(from_codes([[0, 127, 128, 255]], int_grid(8, -1, sym=True)), torch.float16)
    assert octets["weight"].tolist() == [[-128, -1, 0, 127]]
    assert "weight_zero_point" not in octets


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_packs_alike(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = quantized(int_grid(bits, 16), rows=33)
    packed = pack(weight, torch.float16)
    codes, zeros = ((c.int() - 2 ** (bits - 1)).to(torch.int8) for c in (weight.codes, weight.zeros))
    assert torch.equal(packed["weight_packed"], helpers.pack_to_int32(codes, bits))
    assert torch.equal(packed["weight_zero_point"], helpers.pack_to_int32(zeros, bits, packed_dim=0))


@pytest.mark.parametrize(
    ("options", "grid", "natural_order", "config", "line"),
    [
        ({}, int_grid(4), False, LLAMA, r"method\.solver\.static_groups=true .*export\.formats=\[gptq\]"),
        ({}, int_grid(4, 48), True, LLAMA, "group_size=48.*choose 16 or 32 or 64 or -1"),
        ({}, int_grid(4, dtype="float32"), True, LLAMA, r"export\.compressed_tensors\.dtype=float32 or grid"),
        ({"layout": "int8"}, int_grid(4), True, LLAMA, r"bits=8 or export\.compressed_tensors\.layout=pack"),
        ({}, int_grid(4), True, GPT2Config(), "Conv1D"),
    ],
)
def test_what_has_no_room_is_refused_before_calibration(options, grid, natural_order, config, line):
    with pytest.raises(UserError, match=line) as caught:
        CompressedTensorsFormat(**options).check(specs(grid, natural_order), config)
    assert "\n" not in str(caught.value)


def test_an_unknown_layout_is_refused():
    with pytest.raises(UserError, match="give one of pack, int8"):
        CompressedTensorsFormat(layout="int4")  # pyright: ignore[reportArgumentType]


def mixed_source(sym):
    """A tiny Llama whose linears differ in bits and group size, and some in symmetry unless all have it."""
    overrides = {"*.down_proj": {"bits": 8, "group_size": -1, "sym": sym}, "*.0.self_attn.*": {"bits": 3, "sym": True}}
    grid = PerLayerGrid(4, 32, sym, scale_dtype="float32", overrides=overrides)
    return rounded_source(tiny_model("llama"), grid)


def test_linears_on_grids_of_their_own_are_in_groups_of_their_own(reader, tmp_path):
    source = mixed_source(sym=False)
    assert_decodes(CompressedTensorsFormat("float32"), source, tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(name for group in groups.values() for name in group["targets"]) == sorted(source.weights)
    told = {(g["weights"]["num_bits"], g["weights"]["group_size"], g["weights"]["symmetric"]) for g in groups.values()}
    assert told == {(4, 32, False), (8, None, False), (3, 32, True)}


def test_transformers_computes_the_very_same_logits_of_several_grids(tmp_path, tiny_folder):
    pytest.importorskip("compressed_tensors")
    source = mixed_source(sym=True)
    CompressedTensorsFormat("float32").write(source, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, source.model(tokens).logits)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("pack", {"bits": 4}),
        ("pack", {"bits": 3, "sym": True}),
        ("int8", {"bits": 8, "sym": True, "group_size": -1}),
    ],
)
def test_transformers_computes_the_very_same_logits(layout, options, tmp_path, tiny_folder):
    pytest.importorskip("compressed_tensors")
    source = tiny_source(dtype="float32", **options)
    CompressedTensorsFormat("float32", layout).write(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert not [name for name in FolderTensors(tmp_path) if name.endswith("qweight")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, source.model(tokens).logits)
    decoded = list(CompressedTensorsFormat().decode(tmp_path))
    assert len(decoded) == len(source.weights)
    for one in decoded:
        assert_same(one, source.weights[one.name])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_experts_are_linears_of_their_own_and_transformers_reads_them(name, tmp_path):
    model = tiny_model(name)
    unfuse(model)
    weights = quantize_model(model, method="rtn", grid=IntGrid(4, 16, sym=True, scale_dtype="float16")).weights
    source, tokens = Source(model, NoTokenizer(), name, weights), tiny_tokens(1, 24)
    exports = Exports((CompressedTensorsFormat(dtype="float32"),))
    exports.check(source_specs(source), model, None)
    (done,) = exports.write(source, tmp_path, Probe.of(model, tokens, "x"), {}, no_track)
    assert verify(done.path).with_codes
    names = set(FolderTensors(done.path))
    assert any(".experts.3." in n and n.endswith("weight_packed") for n in names)
    with torch.no_grad():
        ours, rebuilt = model(tokens).logits, reference_model(done.path)(tokens).logits
        read = transformers.AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(rebuilt, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(read, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format_", [CompressedTensorsFormat(), GPTQFormat(), AWQFormat()], ids=lambda each: each.name)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_every_matrix_in_a_mixtures_files_is_packed_or_said_not_to_be(name, format_, tmp_path):
    model = tiny_model(name)
    unfuse(model)
    weights = quantize_model(model, method="rtn", grid=IntGrid(4, 16, sym=True, scale_dtype="float16")).weights
    source = Source(model, NoTokenizer(), name, weights)
    format_.check_model(source_specs(source), model, None)
    format_.write(source, tmp_path)
    decoded = {each.name: each for each in format_.decode(tmp_path)}
    assert decoded.keys() == format_.stored(source).keys()
    for module, weight in format_.stored(source).items():
        assert_same(decoded[module], weight)
    tensors = FolderTensors(tmp_path)
    plain = {n.removesuffix(".weight") for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    left = config.get("ignore") or config.get("modules_to_not_convert") or config["dynamic"]
    said = {re.sub(r"^-:\^|\$$|\\", "", each) for each in left}
    assert any(".gate" in each for each in plain), "a router"
    assert {each for each in plain if ".layers." in each} <= said


@pytest.mark.parametrize("name", ["zamba", "falcon_mamba", "gpt_bigcode", "falcon", "kimi_linear", "llama"])
def test_a_warning_before_calibration_names_the_models_that_transformers_cannot_load_packed(name, tmp_path, caplog):
    model = tiny_architecture(name)
    weights = quantize_model(model, method="rtn", grid=IntGrid(4, 16, sym=True, scale_dtype="float16")).weights
    source, format_ = Source(model, NoTokenizer(), name, weights), CompressedTensorsFormat(dtype="float32")
    Exports((format_,)).check(source_specs(source), model, None)
    told = "transformers can't load packed linears" in caplog.text
    format_.write(source, tmp_path)
    assert len(list(format_.decode(tmp_path))) == len(format_.stored(source))
    try:
        read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tiny_tokens()).logits
    except (AttributeError, RuntimeError):  # transformers joins its convolutions by names without packed
        assert told
        assert name == "kimi_linear"
    else:
        assert not told
        torch.testing.assert_close(read, model(tiny_tokens()).logits, rtol=0, atol=1e-5)


def test_only_models_whose_linears_transformers_initializes_are_expanded_while_it_loads_them(tmp_path):
    asked = {}
    for name in ("falcon_mamba", "llama"):
        model = tiny_architecture(name)
        weights = quantize_model(model, method="rtn", grid=IntGrid(4, 16, sym=True, scale_dtype="float16")).weights
        CompressedTensorsFormat().write(Source(model, NoTokenizer(), name, weights), tmp_path)
        asked[name] = json.loads((tmp_path / "config.json").read_text())["quantization_config"].get("dequantize")
    assert asked == {"falcon_mamba": True, "llama": None}


def test_such_a_model_on_several_grids_is_warned_of_as_they_cannot_be_expanded(caplog):
    model = tiny_architecture("falcon_mamba")
    weights = quantize_model(model, method="rtn", grid=IntGrid(4, 16, sym=True, scale_dtype="float16")).weights
    first, *rest = source_specs(Source(model, NoTokenizer(), "x", weights))
    linears = [replace(first, grid=replace(first.grid, bits=8)), *rest]
    Exports((CompressedTensorsFormat(),)).check(linears, model, None)
    assert "transformers can't load packed linears" in caplog.text


def test_experts_that_checkpoints_keep_in_one_tensor_are_refused_before_calibration():
    model = tiny_model("gpt-oss")
    unfuse(model)
    weights = quantize_model(model, method="rtn", grid=IntGrid(4, 32, sym=True, scale_dtype="float16")).weights
    for format_ in (CompressedTensorsFormat(), GPTQFormat(), AWQFormat()):
        with pytest.raises(UserError, match=r"GptOssForCausalLM keep .* in one tensor"):
            format_.check_model(source_specs(Source(model, None, "x", weights)), model, None)


def test_static_scales_of_experts_inputs_are_those_of_the_linear_they_are_of(tmp_path):
    model = tiny_model("mixtral")
    unfuse(model)
    weights = quantize_model(model, method="rtn", grid=IntGrid(8, -1, sym=True, scale_dtype="float16")).weights
    inputs = {name: InputStatistics(torch.ones(1), 1, 1.0 + at) for at, name in enumerate(weights)}
    format_ = CompressedTensorsFormat(layout="int8", activations="int8", static=True)
    format_.write(Source(model, NoTokenizer(), "x", weights, inputs), tmp_path)
    scales = {name: float(x) for name, x in FolderTensors(tmp_path).items() if name.endswith("input_scale")}
    assert len(set(scales.values())) == len(weights)
    prefix = "model.layers.0.block_sparse_moe.experts.1"
    assert (
        scales[f"{prefix}.w1.input_scale"] == scales[f"{prefix}.w3.input_scale"] != scales[f"{prefix}.w2.input_scale"]
    )
