"""ggml blocks: packed bytes give back codes and weights, by this project's decoder and by gguf's."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack, unpack_codes

ROWS, BLOCKS = 5, 6
TYPES = [name for name, kind in BLOCK_TYPES.items() if not (kind.levels or kind.float_scale)]
"""Types that take any code and fp16 scales; the others are in test_gguf_vectors.py."""


def drawn(ggml_type: str, seed: int = 0, rows: int = ROWS, blocks: int = BLOCKS):
    """Random arguments of `pack`, the extremes among them."""
    kind, rng = BLOCK_TYPES[ggml_type], np.random.default_rng(seed)

    def integers(low, high, *shape):
        values = rng.integers(low, high, shape, endpoint=True)
        values.flat[:2] = low, high
        return torch.from_numpy(values)

    def halves(*extremes):
        values = (rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-4, 2, (rows, blocks))).astype(np.float16)
        values.flat[: len(extremes)] = extremes
        return torch.from_numpy(values.astype(np.float32))

    codes = integers(0, kind.max_code, rows, blocks * kind.block).to(torch.uint8)
    codes[1], codes[2] = 0, kind.max_code
    scales, minimums, store = halves(65504, -65504, 0, 2**-24), halves(-65504, 0), {}
    if kind.sub_blocks:
        shape = rows, blocks * kind.sub_blocks
        store = {"d": halves(1000, -1000, 0, 2**-24), "scale_codes": integers(*kind.scale_range, *shape)}
        if kind.minimum:
            store |= {"dmin": halves(-0.5, 1000, 0), "min_codes": integers(*kind.scale_range, *shape)}
    return codes, scales, minimums if kind.minimum else None, store


def expected(ggml_type: str, codes, scales, minimums, store):
    """What the format's formula says, in float32."""
    kind = BLOCK_TYPES[ggml_type]

    def spread(values, width):
        return values.numpy().astype(np.float32).repeat(width, axis=1)

    if ggml_type.startswith("IQ4"):  # llama.cpp's kvalues_iq4nl
        table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
        scale = (
            spread(scales, 32) if ggml_type == "IQ4_NL" else spread(store["d"], 256) * spread(store["scale_codes"], 32)
        )
        return scale * np.array(table, np.float32)[codes.numpy()]
    q, offset = codes.numpy().astype(np.float32), 1 if kind.ternary else 2 ** (kind.bits - 1)
    if kind.sub_blocks:
        width = 256 // kind.sub_blocks
        q = q if kind.minimum else q - offset
        value = spread(store["d"], 256) * spread(store["scale_codes"], width) * q
        return value - spread(store["dmin"], 256) * spread(store["min_codes"], width) if kind.minimum else value
    if kind.minimum:
        return spread(scales, kind.block) * q + spread(minimums, kind.block)
    return spread(scales, kind.block) * (q - offset)


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_formats_own_library_decodes_the_very_weights(ggml_type, seed):
    arguments = drawn(ggml_type, seed)
    decoded = gguf.quants.dequantize(pack(ggml_type, *arguments), Type[ggml_type])
    np.testing.assert_array_equal(decoded, expected(ggml_type, *arguments))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_packing_then_independent_unpacking_gives_the_codes(ggml_type):
    codes, *rest = drawn(ggml_type, 7)
    packed = pack(ggml_type, codes, *rest)
    np.testing.assert_array_equal(unpack_codes(ggml_type, packed), codes.numpy())


@pytest.mark.parametrize("ggml_type", TYPES)
def test_sizes_are_those_of_ggml(ggml_type):
    kind = BLOCK_TYPES[ggml_type]
    assert (kind.block, kind.size) == gguf.GGML_QUANT_SIZES[Type[ggml_type]]
    assert pack(ggml_type, *drawn(ggml_type)).shape == (ROWS, BLOCKS * kind.size)


@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_unpacking_reads_what_the_formats_own_library_wrote(ggml_type):
    weights = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    packed = gguf.quants.quantize(weights, Type[ggml_type])
    kind = BLOCK_TYPES[ggml_type]
    blocks = packed.reshape(-1, kind.size)
    where = slice(-2, None) if kind.ternary else slice(0, 2)
    d = blocks[:, where].copy().view(np.float16).reshape(4, -1)
    m = blocks[:, 2:4].copy().view(np.float16).reshape(4, -1) if kind.minimum else None
    codes = torch.from_numpy(unpack_codes(ggml_type, packed))
    again = pack(ggml_type, codes, torch.from_numpy(d), None if m is None else torch.from_numpy(m), {})
    np.testing.assert_array_equal(again, packed)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rows_are_packed_one_by_one(ggml_type, monkeypatch):
    arguments = drawn(ggml_type, 3)
    whole = pack(ggml_type, *arguments)
    monkeypatch.setattr("gptq_awq.export.gguf_blocks.CODES_AT_ONCE", 1)
    np.testing.assert_array_equal(pack(ggml_type, *arguments), whole)


def test_what_a_type_cannot_hold_is_refused():
    codes, scales, _, _ = drawn("Q4_0")
    with pytest.raises(ValueError, match="codes 0 to 15"):
        pack("Q4_0", codes + 16, scales, None, {})
    with pytest.raises(ValueError, match="multiple of 32"):
        pack("Q4_0", codes[:, :33], scales, None, {})
    with pytest.raises(ValueError, match="one scale for each block"):
        pack("Q4_0", codes, scales[:, :1], None, {})
    with pytest.raises(ValueError, match="fp16"):
        pack("Q4_0", codes, scales + 1e-6, None, {})
    with pytest.raises(ValueError, match="fp16"):
        pack("Q4_0", codes, scales.double() * 1e6, None, {})
    with pytest.raises(ValueError, match="fp16"):
        pack("Q4_0", codes, scales * torch.nan, None, {})
    with pytest.raises(ValueError, match="needs a minimum"):
        pack("Q4_1", codes, scales, None, {})
    with pytest.raises(ValueError, match="IQ1_S is not among"):
        pack("IQ1_S", codes, scales, None, {})
    with pytest.raises(ValueError, match="integer codes"):
        pack("Q4_0", codes.float() + 0.5, scales, None, {})


@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_scales_of_sub_blocks_out_of_range_are_refused(ggml_type):
    codes, scales, _, store = drawn(ggml_type)
    low, high = BLOCK_TYPES[ggml_type].scale_range
    for wrong in (low - 1, high + 1):
        bad = store["scale_codes"].clone()
        bad[0, 0] = wrong
        with pytest.raises(ValueError, match=f"{low} to {high}"):
            pack(ggml_type, codes, scales, None, store | {"scale_codes": bad})
    with pytest.raises(ValueError, match="sub-blocks"):
        pack(ggml_type, codes, scales, None, {"d": store["d"]})
