"""Sources that come quantized: in memory and offloaded they are what the format's own library decodes, bit for bit."""

import json

import pytest
import torch
from helpers.quantized_weights import rounded_source
from helpers.tiny_models import save_tiny_folder, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file

from gptq_awq.errors import UserError
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.models.load import load_reported

PROJECTION = "model.layers.0.mlp.up_proj"
OURS = {
    "gptq": (GPTQFormat(), IntGrid(4, 32, True, scale_dtype="float16")),
    "gptq, 3 bits": (GPTQFormat(), IntGrid(3, 32, scale_dtype="float16")),
    "awq": (AWQFormat(), IntGrid(4, 32, scale_dtype="float16")),
    "compressed-tensors": (CompressedTensorsFormat(), IntGrid(4, 32, True, scale_dtype="float16")),
    "nf4": (BnbFormat("float32"), TableGrid("nf4", 32, double_quant=True)),
    "int8": (BnbFormat("float32"), IntGrid(8, -1, sym=True, scale_dtype="float16")),
}


def loaded(folder, room=None):
    """The model of a folder, and what was said of it; `room` 1 offloads it."""
    return load_reported(folder, "float32", "cpu", "model.path=x", room=room)


def weights_of(model):
    """Every tensor of a model, read from disk where it is offloaded."""
    from gptq_awq.models.offload import each_tensor

    return {name: tensor.detach().clone() for name, tensor in each_tensor(model, lambda _: True)}


def folder_with(tmp_path, tensors, config, without=()):
    """A tiny llama's folder, some of its tensors replaced by codes."""
    folder = save_tiny_folder(tmp_path / "m")
    held = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in held.items() if k not in without} | tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("room", [None, 1], ids=["in memory", "offloaded"])
@pytest.mark.parametrize("kind", OURS)
def test_folders_of_every_format_that_we_write_are_read_as_the_weights_they_hold(kind, room, tmp_path):
    format_, grid = OURS[kind]
    source = rounded_source(tiny_model("llama"), grid)
    format_.write(source, tmp_path)
    save_tiny_folder(tmp_path / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tmp_path / "tokenizer" / file).read_bytes())
    expected = {each.name: each.weight.float() for each in format_.decode(tmp_path)}
    if kind == "compressed-tensors":  # whose library multiplies in the scales' own precision
        expected = {name: weight.half().float() for name, weight in expected.items()}
    found = loaded(tmp_path, room)
    now = weights_of(found.model)
    for name, weight in expected.items():
        assert torch.equal(now[f"{name}.weight"], weight), name
    assert "tensors were decoded" in found.report.row()["quantized_source"]


@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
def test_fp8_is_what_transformers_decodes(scales, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = tiny_model("llama").get_submodule(PROJECTION).weight.data  # (160, 64)
    shape = {"tensor": (), "channel": (160, 1), "block": (5, 2)}[scales]
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.001
    codes = (weight / weight.abs().max() * 400).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "fmt": "e4m3"} | ({"weight_block_size": [32, 32]} if scales == "block" else {})
    parts = {f"{PROJECTION}.weight": codes, f"{PROJECTION}.weight_scale_inv": scale}
    found = loaded(folder_with(tmp_path, parts, config))
    grid = scale.reshape(1, 1) if scales == "tensor" else scale
    expected = Fp8Dequantize(None)._dequantize_one(codes, grid, torch.float32)
    assert torch.equal(found.model.get_submodule(PROJECTION).weight, expected.float())


def test_blocks_of_fp8_that_do_not_divide_a_weight_end_with_it():
    from gptq_awq.models.quantized_source import _scaled

    codes, scale = torch.ones(160, 64).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    found = _scaled({"codes": codes, "scale": scale}, (128, 128))
    assert torch.equal(found, torch.cat([torch.ones(128, 64), 2 * torch.ones(32, 64)]))


@pytest.mark.parametrize("format_", ["nvfp4-pack-quantized", "pack-quantized", "float-quantized"])
def test_modules_of_compressed_tensors_are_what_its_library_decompresses(format_, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    preset = {"nvfp4-pack-quantized": "NVFP4A16", "pack-quantized": "W4A16", "float-quantized": "FP8"}[format_]
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    if format_ == "pack-quantized":
        scheme.weights.group_size = 32
    weight = tiny_model("llama").get_submodule(PROJECTION).weight.data
    draw = torch.Generator().manual_seed(0)
    columns = {"nvfp4-pack-quantized": 4, "pack-quantized": 2, "float-quantized": 1}[format_]
    rows = 1 if format_ == "float-quantized" else 160
    scale = torch.rand((rows, columns), generator=draw) * 0.05 + 0.01
    state = {"weight": weight, "weight_scale": scale}
    if format_ == "nvfp4-pack-quantized":
        state |= {"weight_global_scale": torch.tensor([50.0]), "weight_scale": scale * 50}
    library = BaseCompressor.get_value_from_registry(format_)
    parts = {
        name: torch.tensor(x) if isinstance(x, torch.Size) else x for name, x in library.compress(state, scheme).items()
    }
    group = json.loads(scheme.model_dump_json()) | {"format": format_}
    config = {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}
    named = {f"{PROJECTION}.{name}": part.contiguous() for name, part in parts.items()}
    found = loaded(folder_with(tmp_path, named, config, without=(f"{PROJECTION}.weight",)))
    expected = library.decompress(dict(parts), scheme)["weight"].float()
    assert torch.equal(found.model.get_submodule(PROJECTION).weight, expected)


@pytest.mark.parametrize("room", [None, 1], ids=["in memory", "offloaded"])
def test_gpt_oss_blocks_are_what_transformers_converts(room, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = save_tiny_folder(tmp_path / "m", "gpt-oss")
    held, draw, expected = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0), {}
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = held.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:-1], generator=draw, dtype=torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales).float()
    save_file(held, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(content))
    model = loaded(folder, room).model
    now = weights_of(model)
    assert len(expected) == 4
    for name, weight in expected.items():
        assert torch.equal(now[name], weight)
    if room is None:
        assert torch.isfinite(model(tiny_tokens()).logits).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "quip"}, r"quantized already, by quip, which isn't read; formats that are: fp8, mxfp4"),
        (
            {"quant_method": "gptq", "bits": 4},
            "quantized already, by gptq as config.json has it, and its files hold no",
        ),
    ],
)
def test_what_is_not_read_is_refused_in_a_line(config, said, tmp_path):
    with pytest.raises(UserError, match=said):
        loaded(folder_with(tmp_path, {}, config))
