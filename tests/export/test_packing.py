"""Streams of bits: what is packed by shifts is found again by reading bits."""

import pytest
import torch
from helpers.quantized_weights import int_grid, specs
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_awq.errors import UserError
from gptq_awq.export.packing import exactly, one_int_grid, pack_words, unpack_words
from gptq_awq.grids.ternary import TernaryGrid


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_packing_then_independent_unpacking_gives_the_codes(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-n * bits // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_words(words, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (5, [31, 0, 31], [0x00007C1F]),
        (8, [1, 2, 3, 255], [0xFF030201]),
    ],
)
def test_words_are_those_worked_out_by_hand(bits, codes, words):
    packed = pack_words(torch.tensor([codes], dtype=torch.uint8), bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words


def test_scales_that_a_dtype_would_round_are_not_stored():
    assert exactly(torch.tensor([0.5]), torch.float16, "scales").dtype == torch.float16
    with pytest.raises(ValueError, match="scales are not all float16"):
        exactly(torch.tensor([1 / 3]), torch.float16, "scales")


@pytest.mark.parametrize(
    ("linears", "dtype", "line"),
    [
        (specs(TernaryGrid()), "float16", "choose grid=int"),
        (specs(int_grid(4), a=(64, 64)) + specs(int_grid(3), b=(64, 64)), "float16", "b has its own"),
        (specs(int_grid()), "float64", r"export\.x\.dtype=float64: choose one of float16"),
        (specs(int_grid(dtype="bfloat16")), "float16", r"grid\.scale_dtype=float16"),
        (specs(int_grid(dtype="float32")), "float16", r"grid\.scale_dtype=float16"),
    ],
)
def test_what_no_packed_format_holds_is_refused(linears, dtype, line):
    with pytest.raises(UserError, match=line):
        one_int_grid(linears, "x", dtype, ("float16", "bfloat16"))
