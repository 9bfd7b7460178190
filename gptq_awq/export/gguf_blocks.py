"""ggml's block formats: lossless conversion between integer codes with stored scales and packed bytes.

Codes are unsigned, 0..2^bits-1. A code stands for this weight (ggml/src/ggml-common.h, ggml-quants.c):

    Q4_0 Q5_0 Q8_0    d (code - 2^(bits-1))         32 weights per block; d fp16, any sign
    Q4_1 Q5_1         d code + m                    32; d, m fp16
    IQ4_NL            d table[code]                 32; a table of 16 non-uniform levels; d fp16
    TQ1_0 TQ2_0       d (code - 1), code 0..2       256; d fp16
    Q2_K              d·sc code - dmin·mn           256 in 16 sub-blocks; sc, mn 4 bits; d, dmin fp16
    Q4_K Q5_K         d·sc code - dmin·mn           256 in 8 sub-blocks; sc, mn 6 bits
    Q3_K              d·sc (code - 4)               256 in 16 sub-blocks; sc -32..31
    Q6_K              d·sc (code - 32)              256 in 16 sub-blocks; sc int8
    IQ4_XS            d·sc table[code]              256 in 8 sub-blocks; sc -32..31
    MXFP4 NVFP4       d float[code]                 32; 64 in 4 sub-blocks; d E8M0; E4M3
    IQ2_* IQ3_*       d·u (2 sc + 1) ± level        256 in 8 or 16 sub-blocks; sc 4 bits; a level and sign by code

`pack` lays bits out field by field. `unpack_codes` reads them back weight by weight, from tables of each weight's bit
positions: two independent descriptions of one layout, so that one checks the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gptq_awq.export.gguf_vectors import LAYOUTS, float_scales, vector_codes

Array = np.ndarray[Any, np.dtype[Any]]

POWERS_OF_3 = np.array([81, 27, 9, 3, 1], np.uint8)
CODES_AT_ONCE = 1 << 19  # codes packed per step, so that temporaries stay in the CPU cache


@dataclass(frozen=True)
class BlockType:
    """Block layout of one ggml type: bits, sizes and ranges.

    Attributes:
        bits: bits of a code (2 for ternary types).
        block: number of weights in a block.
        size: bytes of a block.
        sub_blocks: number of sub-blocks of a k-quant's superblock, 0 for other types.
        scale_range: smallest and largest stored integer scale of a sub-block.
        minimum: whether a block (or sub-block) stores a minimum besides its scale.
        ternary: whether codes are 0, 1 and 2 only.
        levels: number of magnitudes of a vector type, whose codes are a level and a sign; 0 for other types.
        float_scale: dtype of the scale where it isn't fp16: e8m0 or e4m3.
    """

    bits: int
    block: int
    size: int
    sub_blocks: int = 0
    scale_range: tuple[int, int] = (0, 0)
    minimum: bool = False
    ternary: bool = False
    levels: int = 0
    float_scale: str = ""

    @property
    def max_code(self) -> int:
        """Largest code: 2 for ternary types, the last level with a sign for vector types, else 2^bits - 1."""
        if self.levels:
            return 2 * self.levels - 1
        return 2 if self.ternary else 2**self.bits - 1


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(4, 32, 18),
    "Q4_1": BlockType(4, 32, 20, minimum=True),
    "Q5_0": BlockType(5, 32, 22),
    "Q5_1": BlockType(5, 32, 24, minimum=True),
    "Q8_0": BlockType(8, 32, 34),
    "IQ4_NL": BlockType(4, 32, 18),
    "Q2_K": BlockType(2, 256, 84, 16, (0, 15), minimum=True),
    "Q3_K": BlockType(3, 256, 110, 16, (-32, 31)),
    "Q4_K": BlockType(4, 256, 144, 8, (0, 63), minimum=True),
    "Q5_K": BlockType(5, 256, 176, 8, (0, 63), minimum=True),
    "Q6_K": BlockType(6, 256, 210, 16, (-128, 127)),
    "TQ1_0": BlockType(2, 256, 54, ternary=True),
    "TQ2_0": BlockType(2, 256, 66, ternary=True),
    "IQ4_XS": BlockType(4, 256, 136, 8, (-32, 31)),
    "MXFP4": BlockType(4, 32, 17, float_scale="e8m0"),
    "NVFP4": BlockType(4, 64, 36, float_scale="e4m3"),
    "IQ2_XXS": BlockType(2, 256, 66, 8, (0, 15), levels=3),
    "IQ2_XS": BlockType(2, 256, 74, 16, (0, 15), levels=3),
    "IQ2_S": BlockType(2, 256, 82, 16, (0, 15), levels=3),
    "IQ3_XXS": BlockType(3, 256, 98, 8, (0, 15), levels=8),
    "IQ3_S": BlockType(3, 256, 110, 8, (0, 15), levels=8),
}


def pack(
    ggml_type: str,
    codes: UInt8[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    minimums: Float[Tensor, "out groups"] | None,
    store: Mapping[str, Tensor],
) -> UInt8[np.ndarray, "out row_bytes"]:
    """Pack a matrix of codes and its scales into ggml blocks, row by row.

    Args:
        ggml_type: a key of BLOCK_TYPES.
        codes: (out, in) codes 0..max_code; `in` is a multiple of the block.
        scales: (out, in / block) scales, exact in fp16; unused for k-quants.
        minimums: (out, in / block) minimums, exact in fp16, for Q4_1 and Q5_1; unused for other types.
        store: second-level tensors of a k-quant, unused for other types: "d" and, for types with a minimum, "dmin",
            (out, in / 256), exact in fp16; "scale_codes" and "min_codes", (out, sub-blocks of the row), integers in
            the type's range.

    Raises:
        ValueError: an unknown type, or values that the type can't store exactly.
    """
    kind = _kind(ggml_type)
    q = _codes(codes, kind, ggml_type)
    blocks = q.shape[1] // kind.block
    if kind.float_scale:
        fields = {"d": float_scales(kind.float_scale, scales, len(q), blocks)}
    elif kind.sub_blocks:
        fields = _k_fields(kind, store, len(q), blocks, ggml_type)
    else:
        fields = {"d": _fp16(scales, (len(q), blocks), "scale", ggml_type)}
        if kind.minimum:
            fields["m"] = _fp16(minimums, (len(q), blocks), "minimum", ggml_type)
    packed = np.empty((len(q), blocks, kind.size), np.uint8)
    step = max(1, CODES_AT_ONCE // max(1, q.shape[1]))
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        part = {name: value[rows] for name, value in fields.items()}
        _LAYOUTS[ggml_type](packed[rows], q[rows].reshape(-1, blocks, kind.block), part)
    return packed.reshape(len(q), -1)


def _kind(ggml_type: str) -> BlockType:
    if ggml_type not in BLOCK_TYPES:
        raise ValueError(f"{ggml_type} is not among the block types {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[ggml_type]


def _codes(codes: Tensor, kind: BlockType, ggml_type: str) -> Array:
    """Convert codes to contiguous uint8. Raises ValueError for a wrong shape, fractions or codes out of range."""
    q = _array(codes)
    if q.ndim != 2 or q.shape[1] % kind.block:
        raise ValueError(f"{ggml_type} takes a matrix whose width is a multiple of {kind.block}, not {q.shape}")
    if q.dtype != np.uint8:
        if q.size and (q.min() < 0 or q.max() > kind.max_code or (q != np.rint(q)).any()):
            raise ValueError(f"{ggml_type} takes integer codes 0 to {kind.max_code}")
        q = q.astype(np.uint8)
    if q.size and kind.max_code < 255 and q.max() > kind.max_code:
        raise ValueError(f"{ggml_type} takes codes 0 to {kind.max_code}, not {q.max()}")
    return np.ascontiguousarray(q)


def _fp16(values: Tensor | None, shape: tuple[int, int], what: str, ggml_type: str) -> Array:
    """Convert to little-endian fp16 bytes, (out, blocks, 2). Raises ValueError where fp16 would round."""
    if values is None:
        raise ValueError(f"{ggml_type} needs a {what} for every block")
    given = _array(values)
    if given.shape != shape:
        raise ValueError(f"{ggml_type} takes one {what} for each block, {shape}, not {given.shape}")
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(given.astype("<f2"))
    if not (np.isfinite(half).all() and (half.astype(given.dtype) == given).all()):
        raise ValueError(f"{ggml_type} stores a {what} in fp16: round it to fp16 before rounding weights")
    return half.view(np.uint8).reshape(*shape, 2)


def _k_fields(kind: BlockType, store: Mapping[str, Tensor], rows: int, blocks: int, name: str) -> dict[str, Array]:
    """Scale fields of a k-quant: superblock d (and dmin) in fp16, integer scales (and minimums) of sub-blocks."""
    fields = {"d": _fp16(store.get("d"), (rows, blocks), "d", name)}
    fields["scales"] = _integers(store.get("scale_codes"), kind.scale_range, (rows, blocks, kind.sub_blocks), name)
    if kind.minimum:
        fields["m"] = _fp16(store.get("dmin"), (rows, blocks), "dmin", name)
        fields["mins"] = _integers(store.get("min_codes"), kind.scale_range, (rows, blocks, kind.sub_blocks), name)
    return fields


def _integers(values: Tensor | None, limits: tuple[int, int], shape: tuple[int, int, int], name: str) -> Array:
    """Convert integer sub-block scales to int16 (rows, blocks, sub-blocks). Raises ValueError if out of range."""
    low, high = limits
    if values is None:
        raise ValueError(f"{name} needs the integer scales (and minimums) of its sub-blocks")
    given = _array(values)
    if given.shape != (shape[0], shape[1] * shape[2]):
        raise ValueError(f"{name} takes {shape[2]} sub-block scales for each 256 weights, not {given.shape}")
    if given.size and (given.min() < low or given.max() > high or (given != np.rint(given)).any()):
        raise ValueError(f"{name} takes integer sub-block scales {low} to {high}")
    return given.astype(np.int16).reshape(shape)


def _array(values: Tensor) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _join(fields: Array, width: int) -> Array:
    """Join n fields of `width` bits, (…, n, bytes) → (…, bytes): field i goes to bits i·width and up."""
    joined = fields[..., 0, :].copy()
    for i in range(1, fields.shape[-2]):
        joined |= fields[..., i, :] << np.uint8(i * width)
    return joined


def _split(q: Array, *shape: int) -> Array:
    return q.reshape(*q.shape[:2], *shape)


def _bytes(fields: Array) -> Array:
    return fields.reshape(*fields.shape[:2], -1)


# Layout functions, one per type: write the bytes out (rows, blocks, size) from the codes q (rows, blocks, weights) and
# the scale fields s.


def _q4_0(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :2] = s["d"]
    out[..., 2:] = _join(_split(q, 2, 16), 4)


def _q4_1(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :2], out[..., 2:4] = s["d"], s["m"]
    out[..., 4:] = _join(_split(q, 2, 16), 4)


def _q5_0(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :2] = s["d"]
    _five_bits(out[..., 2:], q)


def _q5_1(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :2], out[..., 2:4] = s["d"], s["m"]
    _five_bits(out[..., 4:], q)


def _five_bits(out: Array, q: Array) -> None:
    """Write 5-bit codes: a bitmap of the fifth bits, then nibbles."""
    out[..., :4] = np.packbits(q >> 4, axis=-1, bitorder="little")
    out[..., 4:] = _join(_split(q & 15, 2, 16), 4)


def _q8_0(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :2] = s["d"]
    out[..., 2:] = q ^ np.uint8(128)  # code - 128 in two's complement


def _q2_k(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :16] = s["scales"] | s["mins"] << 4
    out[..., 16:80] = _bytes(_join(_split(q, 2, 4, 32), 2))
    out[..., 80:82], out[..., 82:] = s["d"], s["m"]


def _q3_k(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :32] = _join(_split(q >> 2, 8, 32), 1)
    out[..., 32:96] = _bytes(_join(_split(q & 3, 2, 4, 32), 2))
    scales = (s["scales"] + 32).astype(np.uint8)
    out[..., 96:104] = _join(_split(scales & 15, 2, 8), 4)
    out[..., 104:108] = _join(_split(scales >> 4, 4, 4), 2)
    out[..., 108:] = s["d"]


def _q4_k(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    _k_scales(out, s)
    out[..., 16:] = _bytes(_join(_split(q, 4, 2, 32), 4))


def _q5_k(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    _k_scales(out, s)
    out[..., 16:48] = _join(_split(q >> 4, 8, 32), 1)
    out[..., 48:] = _bytes(_join(_split(q & 15, 4, 2, 32), 4))


def _k_scales(out: Array, s: Mapping[str, Array]) -> None:
    """Write d, dmin, and eight 6-bit scales and minimums in 12 bytes.

    The last four of each are split: their top two bits go on top of the first four.
    """
    scales, mins = s["scales"].astype(np.uint8), s["mins"].astype(np.uint8)
    out[..., :2], out[..., 2:4] = s["d"], s["m"]
    out[..., 4:8] = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    out[..., 8:12] = mins[..., :4] | (mins[..., 4:] >> 4) << 6
    out[..., 12:16] = scales[..., 4:] & 15 | (mins[..., 4:] & 15) << 4


def _q6_k(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :128] = _bytes(_join(_split(q & 15, 2, 2, 64), 4))
    out[..., 128:192] = _bytes(_join(_split(q >> 4, 2, 4, 32), 2))
    out[..., 192:208] = s["scales"].astype(np.int8).view(np.uint8)
    out[..., 208:] = s["d"]


def _tq1_0(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    """Write TQ1_0 blocks in base 3: five digits a byte for 160 and 80 weights, four digits a byte for the last 16."""
    at = 0
    for start, digits, width in ((0, 5, 32), (160, 5, 16), (240, 4, 4)):
        part = _split(q[..., start : start + digits * width], digits, width)
        number = (part * POWERS_OF_3[:digits, None]).sum(-2, dtype=np.uint16)
        # Stored as the fraction number / 243 of a byte, rounded up: the decoder multiplies by 3 and takes the overflow.
        out[..., at : at + width] = (number * 256 + 242) // 243
        at += width
    out[..., 52:] = s["d"]


def _tq2_0(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :64] = _bytes(_join(_split(q, 2, 4, 32), 2))
    out[..., 64:] = s["d"]


_LAYOUTS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "IQ4_NL": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    **LAYOUTS,
}


def unpack_codes(ggml_type: str, packed: UInt8[np.ndarray, "out row_bytes"]) -> UInt8[np.ndarray, "out in"]:
    """Unpack the codes of a packed matrix, (out, in). Raises ValueError for an unknown type or incomplete blocks."""
    kind = _kind(ggml_type)
    if packed.ndim != 2 or packed.shape[1] % kind.size:
        raise ValueError(f"{ggml_type} rows are a multiple of {kind.size} bytes, not {packed.shape}")
    blocks = np.ascontiguousarray(packed).reshape(-1, kind.size)
    if kind.levels:
        codes = vector_codes(ggml_type, blocks)
    else:
        codes = _ternary_digits(blocks) if ggml_type == "TQ1_0" else _gathered(blocks, ggml_type)
    return codes.reshape(len(packed), -1)


def _gathered(blocks: Array, ggml_type: str) -> Array:
    """Unpack the codes of each block, (blocks, weights), from their bit fields."""
    codes = np.zeros((len(blocks), BLOCK_TYPES[ggml_type].block), np.uint8)
    for byte, shift, mask, up in _bit_fields(ggml_type):
        codes |= (blocks[:, byte] >> shift & mask) << up
    return codes ^ np.uint8(128) if ggml_type == "Q8_0" else codes


BitFields = tuple[tuple[Array, Array, np.uint8, np.uint8], ...]
"""Per field: byte and shift of each weight, mask, and the shift of the field within the code."""


@lru_cache
def _bit_fields(ggml_type: str) -> BitFields:
    """Positions of the bits of every weight in a block of this type."""
    j = np.arange(BLOCK_TYPES[ggml_type].block)
    low4, high1 = (j % 16, j // 16 * 4, 4), (j // 8, j % 8, 1)  # nibbles of two half blocks; a bitmap
    pairs = (j // 128 * 32 + j % 32, j % 128 // 32 * 2, 2)  # four weights, 32 apart, per byte
    nibbles = (j // 64 * 32 + j % 32, j % 64 // 32 * 4, 4)  # two weights, 32 apart, per byte
    wide = (j // 128 * 64 + j % 64, j % 128 // 64 * 4, 4)  # two weights, 64 apart, per byte
    planes = (j % 32, j // 32, 1)  # bit i of byte l: weight 32 i + l
    # (first byte, pattern, shift within the code)
    fields = {
        "Q4_0": [(2, low4, 0)],
        "Q4_1": [(4, low4, 0)],
        "IQ4_NL": [(2, low4, 0)],
        "Q5_0": [(6, low4, 0), (2, high1, 4)],
        "Q5_1": [(8, low4, 0), (4, high1, 4)],
        "Q8_0": [(2, (j, 0 * j, 8), 0)],
        "IQ4_XS": [(8, (j // 32 * 16 + j % 16, j % 32 // 16 * 4, 4), 0)],
        "MXFP4": [(1, low4, 0)],
        "NVFP4": [(4, (j // 16 * 8 + j % 8, j % 16 // 8 * 4, 4), 0)],
        "Q2_K": [(16, pairs, 0)],
        "Q3_K": [(32, pairs, 0), (0, planes, 2)],
        "Q4_K": [(16, nibbles, 0)],
        "Q5_K": [(48, nibbles, 0), (16, planes, 4)],
        "Q6_K": [(0, wide, 0), (128, pairs, 4)],
        "TQ2_0": [(0, pairs, 0)],
    }[ggml_type]
    return tuple(
        (first + byte, shift.astype(np.uint8), np.uint8(2**width - 1), np.uint8(up))
        for first, (byte, shift, width), up in fields
    )


def _ternary_digits(blocks: Array) -> Array:
    """Unpack TQ1_0 codes: digit n of a byte is the integer part of 3 · frac(3^n · byte / 256)."""
    codes = np.empty((len(blocks), 256), np.uint16)
    for j in range(256):
        byte, digit = (j % 32, j // 32) if j < 160 else (32 + j % 16, (j - 160) // 16)
        if j >= 240:
            byte, digit = 48 + j % 4, (j - 240) // 4
        codes[:, j] = blocks[:, byte] * np.uint16(3**digit) % 256 * 3 >> 8
    return codes.astype(np.uint8)
