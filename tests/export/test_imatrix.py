"""Importance matrices: what gguf reads of ours, what we read of llama.cpp's, and runs that take one."""

import struct

import gguf
import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.tiny_models import tiny_tokens as tiny_ids

from gptq_awq.calibration.input_statistics import InputStatistics, as_file, from_file, input_statistics
from gptq_awq.calibration.moments import Moments
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.export.imatrix import read_imatrix, squares_by_module, write_imatrix
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.rtn import RTN


def tiny_tokens():
    return make_token_set("tokens", tiny_ids(), None, "test")


def statistics(width=8, tokens=100, seed=0):
    squares = torch.rand(width, generator=torch.Generator().manual_seed(seed)) + 0.1
    return InputStatistics(squares, tokens, 3.0)


def test_statistics_are_the_diagonal_of_h():
    model, tokens = tiny_model("llama"), tiny_tokens()
    found = input_statistics(model, tokens)
    seen = []
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens.ids)
    handle.remove()
    x = torch.cat(seen)
    own = found["model.layers.1.mlp.down_proj"]
    assert torch.allclose(own.squares, x.square().mean(0), rtol=1e-4)
    assert own.tokens == tokens.ids.numel()
    assert own.largest == pytest.approx(float(x.abs().max()), rel=1e-5)
    assert "lm_head" in found
    again = dict(from_file(as_file(found)))
    assert again.keys() == found.keys()
    assert torch.equal(again["lm_head"].squares, found["lm_head"].squares)


def test_gguf_reads_what_is_written(tmp_path):
    path, experts = tmp_path / "imatrix.gguf", [statistics(seed=i, tokens=10 * i) for i in range(3)]
    write_imatrix(path, {"blk.0.attn_q.weight": statistics(), "blk.0.ffn_up_exps.weight": experts})
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape.tolist() == [8, 3]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape.tolist() == [1, 3]
    found = read_imatrix(path)
    np.testing.assert_allclose(found["blk.0.attn_q"], statistics().squares[None], rtol=1e-6)
    np.testing.assert_allclose(found["blk.0.ffn_up_exps"][2], experts[2].squares, rtol=1e-6)
    assert (found["blk.0.ffn_up_exps"][0] == 1).all()  # no token reached it


def test_the_older_format_is_read(tmp_path):
    path, squares = tmp_path / "imatrix.dat", np.arange(1, 9, dtype=np.float32)
    name = b"blk.0.attn_q.weight"
    path.write_bytes(
        struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, 8) + (4 * squares).tobytes() + b"\0" * 8
    )
    np.testing.assert_array_equal(read_imatrix(path)["blk.0.attn_q"], squares[None])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\1\0\0\0\xff\xff\xff\x7f", b"\0" * 64, b"GGUF" + b"\xff" * 200])
def test_what_is_no_importance_matrix_is_refused_by_name(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="file") as caught:
        read_imatrix(tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("converter")
def test_names_are_those_of_the_model():
    model = tiny_model("llama")
    found = squares_by_module({"blk.1.ffn_down": np.ones((1, 160), np.float32)}, model)
    assert list(found) == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(UserError, match="none of which the model has"):
        squares_by_module({"blk.9.ffn_down": np.ones((1, 160), np.float32)}, model)


def test_rounding_to_squares_is_rounding_to_a_diagonal_h():
    model = tiny_model("llama")
    squares = {name: own.squares for name, own in input_statistics(model, tiny_tokens()).items()}
    name = "model.layers.0.mlp.up_proj"
    weight, diagonal = model.get_submodule(name).weight.detach().clone(), squares[name].diag()
    grid = SignedGrid(4, 32, "hessian")
    method = Method("rtn", RTN())
    weights = {k: w for block in quantize(model, None, method, grid, squares=squares) for k, w in block.weights.items()}
    expected = RTN().solve(weight, Moments(diagonal, squares[name].sqrt(), 1), grid).quantized
    assert torch.equal(weights[name].codes, expected.codes)
    assert torch.equal(weights[name].scales, expected.scales)
    assert not torch.equal(weights[name].scales, RTN().solve(weight, None, SignedGrid(4, 32)).quantized.scales)
    assert KGrid("q4_k", "hessian").needs_hessian  # so that its searches read the diagonal, too
