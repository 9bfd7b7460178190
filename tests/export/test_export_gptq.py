"""GPTQ checkpoints: the very codes and weights come back, and what has no room is refused beforehand."""

import json
import subprocess

import pytest
import torch
from helpers.quantized_weights import (
    ORDERS,
    assert_same,
    from_codes,
    int_grid,
    quantized,
    save_packed,
    specs,
    tiny_source,
)
from transformers import LlamaConfig

from gptq_awq.errors import UserError
from gptq_awq.export.engines import find
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gptq import GPTQFormat, pack, quantization_config

LLAMA = LlamaConfig()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 16, 40])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_then_independent_unpacking_gives_the_codes(bits, sym, group_size, order, version, tmp_path):
    grid = int_grid(bits, group_size, sym, min_zero=1 if version == "v1" and not sym else 0)
    weight = quantized(grid, order)
    config = quantization_config(grid, version, desc_act=not weight.natural_order)
    save_packed(tmp_path, pack(weight, version, torch.float16), config)
    (decoded,) = GPTQFormat().decode(tmp_path)
    assert_same(decoded, weight)


def test_tensors_are_those_worked_out_by_hand():
    grid = int_grid(4, -1)
    weight = from_codes([[1, 2, 3, 4, 5, 6, 7, 8]] * 7 + [[0] * 8], grid, scale=0.5, zero=[1, 2, 3, 4, 5, 6, 7, 8])
    v1, v2 = (pack(weight, version, torch.float16) for version in ("v1", "v2"))
    words = {name: [word & 0xFFFFFFFF for word in v1[name].flatten().tolist()] for name in ("qweight", "qzeros")}
    assert words == {"qweight": [0x87654321] * 7 + [0], "qzeros": [0x76543210]}
    assert v2["qzeros"].item() & 0xFFFFFFFF == 0x87654321
    assert torch.equal(v1["scales"], torch.full((1, 8), 0.5, dtype=torch.float16))
    assert v1["g_idx"].tolist() == [0] * 8
    assert [tensor.dtype for tensor in v1.values()] == [torch.int32, torch.int32, torch.float16, torch.int32]


def test_three_bit_codes_straddle_words():
    weight = from_codes([[0, 1, 2, 3, 4, 5, 6, 7] * 4] * 32, int_grid(3, -1, sym=True))
    packed = pack(weight, "v1", torch.float16)
    assert [word & 0xFFFFFFFF for word in packed["qweight"][:, 5].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    # Zeros 4 - 1 = 0b011: 011011… from the lowest bit up.
    assert [word & 0xFFFFFFFF for word in packed["qzeros"][0].tolist()] == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]


def test_v1_never_stores_a_zero_point_of_zero():
    with pytest.raises(ValueError, match="0 has no room"):
        pack(quantized(int_grid(4, 32)), "v1", torch.float16)


@pytest.mark.parametrize(
    ("options", "grid", "shape", "line"),
    [
        ({}, int_grid(5), (64, 64), "bits=5: .*bits=4"),
        ({}, int_grid(3, -1), (64, 40), "columns in multiples of 32.*compressed_tensors"),
        ({}, int_grid(3, -1), (40, 64), "rows in multiples of 32"),
        ({}, int_grid(8, -1), (6, 64), "rows in multiples of 4"),
        ({"zero_point": "v1"}, int_grid(4), (64, 64), r"grid\.min_zero=1 or export\.gptq\.zero_point=v2"),
        ({"dtype": "float32"}, int_grid(4, dtype="float32"), (64, 64), r"export\.gptq\.dtype=float32"),
    ],
)
def test_what_has_no_room_is_refused_before_calibration(options, grid, shape, line):
    with pytest.raises(UserError, match=line) as caught:
        GPTQFormat(**options).check(specs(grid, lin=shape), LLAMA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("natural_order", [True, False])
def test_what_fits_is_taken(bits, natural_order):
    GPTQFormat().check(specs(int_grid(bits, 32), natural_order), LLAMA)
    GPTQFormat(zero_point="v1").check(specs(int_grid(bits, 32, min_zero=1), natural_order), LLAMA)
    GPTQFormat(dtype="bfloat16").check(specs(int_grid(bits, 32, dtype="bfloat16"), natural_order), LLAMA)


def test_an_unknown_convention_is_refused():
    with pytest.raises(UserError, match="give one of auto, v1, v2"):
        GPTQFormat(zero_point="v3")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("sym", "said"), [(True, "gptq"), (False, "gptq_v2")])
def test_a_folder_says_what_it_holds(sym, said, tmp_path):
    source = tiny_source(sym=sym)
    GPTQFormat().write(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "quantize_config.json").read_text())
    assert (config["checkpoint_format"], config["sym"], config["desc_act"]) == (said, sym, False)
    assert config["meta"]["quantizer"][0].startswith("gptq_awq:")
    stored = FolderTensors(tmp_path)
    assert not [name for name in stored if name.removesuffix(".weight") in source.weights]
    assert {name for name in stored if name.endswith(".qweight")} == {f"{name}.qweight" for name in source.weights}
    decoded = list(GPTQFormat().decode(tmp_path))
    assert len(decoded) == len(source.weights)
    for one in decoded:
        assert_same(one, source.weights[one.name])


@pytest.mark.parametrize(("static_groups", "desc_act"), [(True, False), (False, True)])
def test_desc_act_tells_whether_groups_are_permuted(static_groups, desc_act, tmp_path):
    from gptq_awq.quantization.method import Method
    from gptq_awq.solvers.gptq import GPTQ

    source = tiny_source(Method("gptq", GPTQ(act_order=True, static_groups=static_groups)))
    GPTQFormat().write(source, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["desc_act"] is desc_act


GPTQMODEL_UNPACKS = """
import sys, torch
from safetensors.torch import load_file, save_file
from gptqmodel.utils.model_dequant import _correct_gptq_v1_qzeros, unpack_cols, unpack_rows
tensors = load_file(sys.argv[1] + "/model.safetensors")
bits, v1 = int(sys.argv[2]), sys.argv[3] == "v1"
qzeros = tensors["lin.qzeros"]
qzeros = _correct_gptq_v1_qzeros(qzeros, bits) if v1 else qzeros
save_file({
    "codes": unpack_rows(tensors["lin.qweight"], bits).to(torch.uint8).T.contiguous(),
    "zeros": unpack_cols(qzeros, bits).to(torch.uint8).T.contiguous(),
}, sys.argv[1] + "/unpacked.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gptqmodel_unpacks_the_very_codes_and_zeros(bits, version, tmp_path):
    from safetensors.torch import load_file

    python = find("gptqmodel", "gptq")
    if python is None:
        pytest.skip("gptqmodel is not installed: python scripts/install_engine.py gptqmodel")
    grid = int_grid(bits, 32, min_zero=1 if version == "v1" else 0)
    weight = quantized(grid, "act_order")
    save_packed(tmp_path, pack(weight, version, torch.float16), quantization_config(grid, version, desc_act=True))
    command = [python, "-I", "-c", GPTQMODEL_UNPACKS, tmp_path, str(bits), version]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    unpacked = load_file(tmp_path / "unpacked.safetensors")
    assert torch.equal(unpacked["codes"], weight.codes)
    assert torch.equal(unpacked["zeros"].float(), weight.zeros)
