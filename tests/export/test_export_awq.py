"""AWQ checkpoints: the very codes and weights come back, and what has no room is refused beforehand."""

import json
import subprocess

import pytest
import torch
from helpers.quantized_weights import assert_same, from_codes, int_grid, quantized, save_packed, specs, tiny_source
from transformers import GPT2Config, LlamaConfig

from gptq_awq.errors import UserError
from gptq_awq.export.awq import AWQFormat, pack, quantization_config
from gptq_awq.export.engines import find
from gptq_awq.export.folder import FolderTensors

LLAMA = LlamaConfig()


@pytest.mark.parametrize("order", ["natural", "static_groups"])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packing_then_independent_unpacking_gives_the_codes(sym, group_size, order, dtype, tmp_path):
    grid = int_grid(4, group_size, sym, dtype)
    weight = quantized(grid, order)
    save_packed(tmp_path, pack(weight, getattr(torch, dtype)), quantization_config(grid, ["lm_head"]))
    (decoded,) = AWQFormat().decode(tmp_path)
    assert_same(decoded, weight)


def test_tensors_are_those_worked_out_by_hand():
    # Channel c holds code c in column 0 and 15 - c in column 1; nibbles, lowest first, are channels 0 2 4 6 1 3 5 7.
    weight = from_codes([[c, 15 - c] for c in range(8)], int_grid(4, -1), scale=0.5, zero=range(8))
    packed = pack(weight, torch.float16)
    assert [word & 0xFFFFFFFF for word in packed["qweight"].flatten().tolist()] == [0x75316420, 0x8ACE9BDF]
    assert [word & 0xFFFFFFFF for word in packed["qzeros"].flatten().tolist()] == [0x75316420]
    assert torch.equal(packed["scales"], torch.full((1, 8), 0.5, dtype=torch.float16))
    assert (packed["qweight"].shape, packed["qzeros"].shape) == ((2, 1), (1, 1))


def test_a_symmetric_grid_is_held_with_zero_point_eight():
    packed = pack(quantized(int_grid(4, 32, sym=True)), torch.float16)
    assert {word & 0xFFFFFFFF for word in packed["qzeros"].flatten().tolist()} == {0x88888888}


@pytest.mark.parametrize(
    ("grid", "natural_order", "shape", "config", "line"),
    [
        (int_grid(3), True, (64, 64), LLAMA, "bits=3: awq packs 4 bits; choose bits=4"),
        (int_grid(4), False, (64, 64), LLAMA, r"method\.solver\.static_groups=true, or export\.formats=\[gptq\]"),
        (int_grid(4), True, (60, 64), LLAMA, "rows in multiples of 8"),
        (int_grid(4, 48), True, (64, 64), LLAMA, "group_size=48.*choose 16 or 32 or 64 or -1"),
        (int_grid(4, dtype="bfloat16"), True, (64, 64), LLAMA, r"export\.awq\.dtype=bfloat16"),
        (int_grid(4), True, (64, 64), GPT2Config(), r"export\.formats=awq: .*Conv1D"),
    ],
)
def test_what_has_no_room_is_refused_before_calibration(grid, natural_order, shape, config, line):
    with pytest.raises(UserError, match=line) as caught:
        AWQFormat().check(specs(grid, natural_order, lin=shape), config)
    assert "\n" not in str(caught.value)


def test_a_folder_says_what_it_holds(tmp_path):
    source = tiny_source()
    AWQFormat().check([s for name, w in source.weights.items() for s in specs(w.grid, **{name: w.codes.shape})], LLAMA)
    AWQFormat().write(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["version"], config["bits"], config["zero_point"], config["group_size"]) == ("gemm", 4, True, 32)
    assert config["modules_to_not_convert"] == ["lm_head"]
    stored = FolderTensors(tmp_path)
    assert {name for name in stored if name.endswith(".qweight")} == {f"{name}.qweight" for name in source.weights}
    decoded = list(AWQFormat().decode(tmp_path))
    assert len(decoded) == len(source.weights)
    for one in decoded:
        assert_same(one, source.weights[one.name])


GPTQMODEL_UNPACKS = """
import sys, torch
from safetensors.torch import load_file, save_file
from gptqmodel.quantization.awq.utils.packing_utils import reverse_awq_order, unpack_awq
tensors = load_file(sys.argv[1] + "/model.safetensors")
codes, zeros = reverse_awq_order(*unpack_awq(tensors["lin.qweight"], tensors["lin.qzeros"], 4), 4)
save_file({
    "codes": (codes & 15).to(torch.uint8).T.contiguous(),
    "zeros": (zeros & 15).to(torch.uint8).T.contiguous(),
}, sys.argv[1] + "/unpacked.safetensors")
"""


@pytest.mark.slow
def test_gptqmodel_unpacks_the_very_codes_and_zeros(tmp_path):
    from safetensors.torch import load_file

    python = find("gptqmodel", "awq")
    if python is None:
        pytest.skip("gptqmodel is not installed: python scripts/install_engine.py gptqmodel")
    weight = quantized(int_grid(4, 32))
    save_packed(tmp_path, pack(weight, torch.float16), quantization_config(int_grid(4, 32), []))
    command = [python, "-I", "-c", GPTQMODEL_UNPACKS, tmp_path]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    unpacked = load_file(tmp_path / "unpacked.safetensors")
    assert torch.equal(unpacked["codes"], weight.codes)
    assert torch.equal(unpacked["zeros"].float(), weight.zeros)
