"""ggml's newer blocks: IQ4_XS, MXFP4, NVFP4, and the vector types IQ2_XXS to IQ3_S.

    IQ4_XS    d, high 2 bits of 8 scales, low 4 bits of them, nibbles
    MXFP4     E8M0, nibbles                       32 weights per block
    NVFP4     4 scales in E4M3, nibbles           64
    IQ2_XXS   d, per 32 weights: 4 indices in bytes; a word of 4 × 7 signs and a scale on top
    IQ2_XS    d, per 8 weights: 9 bits of index, 7 signs; 16 scales in nibbles
    IQ2_S     d, low 8 bits of 32 indices, signs, high 2 bits of the indices, 16 scales in nibbles
    IQ3_XXS   d, 64 indices in bytes; per 32 weights a word of 4 × 7 signs and a scale on top
    IQ3_S     d, low 8 bits of 64 indices, a bitmap of the ninth bits, signs, 8 scales in nibbles

Codes of vector types are of single columns, a level and a sign (grids/vectors.py); here a vector's levels become the
index of its entry. They are read back by the gguf library, from blocks whose scales are set to one.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gptq_awq.grids.vectors import VECTOR_TYPES, codebook

Array = np.ndarray[Any, np.dtype[Any]]
Layout = Callable[[Array, Array, Mapping[str, Array]], None]


@lru_cache
def _index_of_levels(name: str) -> Int[np.ndarray, "combinations"]:
    """Index of the entry with given levels, its first column's the lowest digit; -1 where there is none."""
    book = codebook(name)
    count, columns = len(book.levels), book.entries.shape[1]
    table = np.full(count**columns, -1, np.int32)
    table[(book.indices * count ** np.arange(columns)).sum(1)] = np.arange(len(book.entries))
    return table


def _indices_and_signs(name: str, q: Array) -> tuple[Array, Array]:
    """Entries' indices (rows, blocks, 256 / v) and signs as bytes (rows, blocks, 32).

    Raises:
        ValueError: levels that are no entry of the codebook, or signs that the type cannot hold.
    """
    book, kind = codebook(name), VECTOR_TYPES[name]
    count, columns = len(book.levels), kind.columns
    levels = (q % count).reshape(*q.shape[:2], -1, columns).astype(np.int32)
    indices = _index_of_levels(name)[(levels * count ** np.arange(columns)).sum(-1)]
    signs = np.packbits(q >= count, axis=-1, bitorder="little")
    if (indices < 0).any():
        raise ValueError(f"{name.upper()}: codes that are no entry of its codebook")
    if kind.even and (np.bitwise_count(signs) % 2).any():
        raise ValueError(f"{name.upper()}: an odd number of negative signs in eight columns")
    return indices, signs


def _nibbles(values: Array) -> Array:
    """Pairs of 4-bit values as bytes, the first one low."""
    return (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)


def _words(signs: Array, scales: Array) -> Array:
    """Words of four times seven signs, and a scale in the top four bits, as bytes."""
    seven = (signs & 127).reshape(*signs.shape[:2], 8, 4).astype(np.uint32)
    word = seven[..., 0] | seven[..., 1] << 7 | seven[..., 2] << 14 | seven[..., 3] << 21
    word |= scales.astype(np.uint32) << 28
    return np.ascontiguousarray(word.astype("<u4")).view(np.uint8).reshape(*signs.shape[:2], 8, 4)


def _iq2_xxs(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    indices, signs = _indices_and_signs("iq2_xxs", q)
    out[..., :2] = s["d"]
    entries = indices.astype(np.uint8).reshape(*q.shape[:2], 8, 4)
    out[..., 2:] = np.concatenate([entries, _words(signs, s["scales"])], -1).reshape(*q.shape[:2], 64)


def _iq2_xs(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    indices, signs = _indices_and_signs("iq2_xs", q)
    out[..., :2] = s["d"]
    both = (indices | (signs & 127).astype(np.int32) << 9).astype("<u2")
    out[..., 2:66] = np.ascontiguousarray(both).view(np.uint8)
    out[..., 66:] = _nibbles(s["scales"])


def _iq2_s(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    indices, signs = _indices_and_signs("iq2_s", q)
    out[..., :2] = s["d"]
    out[..., 2:34], out[..., 34:66] = indices & 255, signs
    high = (indices >> 8).reshape(*q.shape[:2], 8, 4)
    out[..., 66:74] = (high << np.array([0, 2, 4, 6])).sum(-1)
    out[..., 74:] = _nibbles(s["scales"])


def _iq3_xxs(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    indices, signs = _indices_and_signs("iq3_xxs", q)
    out[..., :2] = s["d"]
    out[..., 2:66] = indices
    out[..., 66:] = _words(signs, s["scales"]).reshape(*q.shape[:2], 32)


def _iq3_s(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    indices, signs = _indices_and_signs("iq3_s", q)
    out[..., :2] = s["d"]
    out[..., 2:66] = indices & 255
    out[..., 66:74] = np.packbits(indices >> 8, axis=-1, bitorder="little")
    out[..., 74:106], out[..., 106:] = signs, _nibbles(s["scales"])


def _iq4_xs(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    scales = (s["scales"] + 32).astype(np.uint16)
    out[..., :2] = s["d"]
    high = ((scales >> 4) << (2 * np.arange(8, dtype=np.uint16))).sum(-1, dtype=np.uint16)
    out[..., 2:4] = np.ascontiguousarray(high.astype("<u2")[..., None]).view(np.uint8)
    out[..., 4:8] = _nibbles(scales & 15)
    halves = q.reshape(*q.shape[:2], 8, 2, 16)
    out[..., 8:] = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*q.shape[:2], 128)


def _mxfp4(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :1] = s["d"]
    out[..., 1:] = q[..., :16] | q[..., 16:] << 4


def _nvfp4(out: Array, q: Array, s: Mapping[str, Array]) -> None:
    out[..., :4] = s["d"]
    halves = q.reshape(*q.shape[:2], 4, 2, 8)
    out[..., 4:] = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*q.shape[:2], 32)


LAYOUTS: Mapping[str, Layout] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}


def float_scales(dtype: str, scales: Tensor, rows: int, blocks: int) -> Array:
    """Scales in E8M0 or E4M3 as bytes, (out, blocks, scales of a block). Raises ValueError if they would be rounded."""
    given = scales.detach().cpu().float()
    if dtype == "e8m0":
        exponent = torch.frexp(given).exponent + 126
        stored, same = exponent.to(torch.uint8), torch.exp2(exponent.float() - 127)
    else:
        small = given.to(torch.float8_e4m3fn)
        stored, same = small.view(torch.uint8), small.float()
    if not torch.equal(same, given):
        raise ValueError(f"scales are not all {dtype} numbers")
    return stored.numpy().reshape(rows, blocks, -1)


_HALF_ONE = np.array([1.0], "<f2").view(np.uint8)
_TOP_NIBBLES = {"IQ2_XXS": range(9, 66, 8), "IQ3_XXS": range(69, 98, 4)}
"""Bytes whose upper half is a scale."""
_SCALES = {"IQ2_XS": slice(66, 74), "IQ2_S": slice(74, 82), "IQ3_S": slice(106, 110)}


def vector_codes(ggml_type: str, blocks: Array) -> Array:
    """Codes of each block (blocks, 256), as the gguf library decodes them where all scales are one."""
    name, plain = ggml_type.lower(), blocks.copy()
    plain[:, :2] = _HALF_ONE
    if ggml_type in _SCALES:
        plain[:, _SCALES[ggml_type]] = 0
    else:
        plain[:, list(_TOP_NIBBLES[ggml_type])] &= 15
    values = gguf.quants.dequantize(plain, gguf.GGMLQuantizationType[ggml_type]) / np.float32(VECTOR_TYPES[name].unit)
    levels = codebook(name).levels
    return (np.searchsorted(levels, np.abs(values)) + len(levels) * (values < 0)).astype(np.uint8)
