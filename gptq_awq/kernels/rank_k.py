"""Rank-k updates C += XᵀX, C += XᵀY of bfloat16 X, Y with float32 sums, on CPUs that have dpbf16ps (AVX512-BF16).

torch.mm rounds a bfloat16 product's result to bfloat16, too coarse for a Hessian to factor. This kernel keeps it in
float32, computes only tiles on and above the diagonal (half the work), and runs at the speed of torch's bfloat16
matmul: twice that of float32 per flop. The inner loop is written in LLVM's intermediate representation, as numba has no
vectors.

    X (tokens, n) → panels of PANEL columns, two tokens of a column in one 32-bit word (dpbf16ps' layout)
    C tile (ROWS, PANEL) += panel_Iᵀ panel_J, for panels I ≤ J: ROWS · VECTORS registers of sums
"""

from functools import cache

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq_awq.kernels.compiled import compiled

VECTOR = 16
"""Number of 32-bit words in a vector register."""
ROWS, VECTORS = 8, 3
"""Rows and vectors of a tile: 24 registers of sums, 3 of X and 1 for a broadcast, of 32."""
PANEL = VECTOR * VECTORS
"""Number of columns in a panel."""
MAX_TOKENS = 4096
"""Tokens that are added at once: a pair of their panels stays in the second-level cache."""


@cache
def available() -> bool:
    """Whether this CPU has the instruction dpbf16ps (AVX512-BF16)."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


class _BFloat(ir.types.Type):
    """LLVM's type bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SUMS, _WORDS, _PAIRS = ir.VectorType(ir.FloatType(), VECTOR), ir.VectorType(_I32, VECTOR), ir.VectorType(_BFloat(), 32)


@numba.njit(inline="always")
def bfloat16(bits):  # pragma: no cover (compiled)
    """Round the bits of a float32 to those of the nearest bfloat16, ties to even; NaN stays NaN."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded if (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint32(0x7FC0)


@intrinsic
def add_tile(_context, left, right, pairs, out, stride):  # noqa: ARG001  # pragma: no cover (compiled)
    """Add leftᵀ right to the tile out (ROWS, PANEL) float32.

    Args:
        left: address of ROWS columns of a panel (pairs, PANEL) of uint32 words, two bfloat16 numbers each.
        right: address of a panel (pairs, PANEL).
        pairs: number of words that are summed over.
        out: address of the tile.
        stride: distance of the tile's rows, in floats.
    """
    return types.void(types.uintp, types.uintp, types.intp, types.uintp, types.intp), _emit_add_tile


def _emit_add_tile(context, builder, _signature, arguments):
    """Emit the code of `add_tile`: a loop over words with the tile's sums in registers, added to `out` at its end."""
    left, right, pairs, out, stride = arguments
    words = ir.IntType(32).as_pointer()
    left, right = builder.inttoptr(left, words), builder.inttoptr(right, words)
    out = builder.inttoptr(out, ir.FloatType().as_pointer())
    tile = [(row, v) for row in range(ROWS) for v in range(VECTORS)]
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    k.add_incoming(_I64(0), before)
    sums = [builder.phi(_SUMS) for _ in tile]
    for value in sums:
        value.add_incoming(ir.Constant(_SUMS, None), before)
    added = _emit_products(builder, left, right, builder.mul(k, _I64(PANEL)), sums)
    following = builder.add(k, _I64(1))
    k.add_incoming(following, loop)
    for value, new in zip(sums, added, strict=True):
        value.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
    builder.position_at_end(after)
    for (row, v), new in zip(tile, added, strict=True):
        offset = builder.add(builder.mul(stride, _I64(row)), _I64(VECTOR * v))
        total = _vector_at(builder, out, offset, _SUMS)
        builder.store(builder.fadd(builder.load(total, align=4), new), total, align=4)
    return context.get_dummy_value()


def _emit_products(builder, left, right, word, sums):
    """Emit the products of one word of each column, from `word` on, added to the tile's sums; return the new sums."""
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    xs = []
    for v in range(VECTORS):
        x = builder.load(_vector_at(builder, right, builder.add(word, _I64(VECTOR * v)), _WORDS), align=4)
        xs.append(builder.bitcast(x, _PAIRS))
    undefined = ir.Constant(_WORDS, ir.Undefined)
    added = []
    for row in range(ROWS):
        scalar = builder.load(builder.gep(left, [builder.add(word, _I64(row))]), align=4)
        lane = builder.insert_element(undefined, scalar, _I32(0))
        y = builder.bitcast(builder.shuffle_vector(lane, undefined, ir.Constant(_WORDS, [0] * VECTOR)), _PAIRS)
        added += [builder.call(multiply_add, [sums[row * VECTORS + v], y, xs[v]]) for v in range(VECTORS)]
    return added


def _vector_at(builder, base, index, vector):
    """Emit the address of a vector that begins at base[index]."""
    return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())


@compiled
def _pack(x, panels, magnitude, largest):  # pragma: no cover (compiled)
    """Lay X out in panels, add each column's Σ |x| to `magnitude`, and raise `largest` to its max |x|.

    Args:
        x: (tokens, n) uint16: bfloat16 bits.
        panels: (panels, ⌈tokens/2⌉, PANEL) uint32, written; columns beyond n are zero.
        magnitude: (panels, PANEL) float32, added to.
        largest: (panels, PANEL) uint32, raised: bits of float32 numbers, whose order is that of their magnitudes.
    """
    tokens, n = x.shape
    for p in numba.prange(len(panels)):
        first, count = p * PANEL, min(PANEL, n - p * PANEL)
        bits = np.zeros((2, PANEL), np.uint32)
        values = bits.view(np.float32)
        total, top = np.zeros(PANEL, np.float32), np.zeros(PANEL, np.uint32)
        for k in range(panels.shape[1]):
            a, b = x[2 * k, first : first + count], x[min(2 * k + 1, tokens - 1), first : first + count]
            real = np.uint32(0xFFFF if 2 * k + 1 < tokens else 0)  # an odd last token is paired with zeros
            words = panels[p, k]
            for j in range(count):
                low, high = np.uint32(a[j]), np.uint32(b[j]) & real
                words[j] = low | (high << np.uint32(16))
                bits[0, j] = (low & np.uint32(0x7FFF)) << np.uint32(16)  # its magnitude, as float32
                bits[1, j] = (high & np.uint32(0x7FFF)) << np.uint32(16)
            for j in range(count, PANEL):
                words[j] = np.uint32(0)
            for j in range(count):
                total[j] += values[0, j] + values[1, j]
            for j in range(count):
                greater = bits[0, j] if bits[0, j] > bits[1, j] else bits[1, j]
                top[j] = greater if greater > top[j] else top[j]
        for j in range(count):
            magnitude[p, j] += total[j]
            largest[p, j] = top[j] if top[j] > largest[p, j] else largest[p, j]


@compiled
def _multiply(lefts, rights, pairs, out):  # pragma: no cover (compiled)
    """Add left_Iᵀ right_J to its tile of out (panels · PANEL, panels · PANEL) for each row (I, J) of `pairs`."""
    for index in numba.prange(len(pairs)):
        row, column = pairs[index]
        for r in range(0, PANEL, ROWS):
            address = out.ctypes.data + 4 * ((row * PANEL + r) * out.shape[1] + column * PANEL)
            left, right = lefts[row].ctypes.data + 4 * r, rights[column].ctypes.data
            add_tile(left, right, lefts.shape[1], address, out.shape[1])  # pyright: ignore[reportCallIssue]


class RankK:
    """Accumulates XᵀX, Σ |x| and max |x| over batches of X, and XᵀY where Y is given.

    Attributes:
        products: (≥ n, ≥ n) float32: Σ xᵀx on and above the diagonal of its first n rows and columns; other entries
            are undefined.
        magnitude: (≥ n,) float32: Σ |x|.
        largest: (≥ n,) float32: max |x|; NaN where any x is.
        cross: (≥ n, ≥ n) float32: Σ xᵀy in its first n rows and columns; None where no Y was given. For Y = X
            it equals `products`, bit for bit.
    """

    def __init__(self, n: int) -> None:
        columns = -(-n // PANEL)
        self.products = np.zeros((columns * PANEL, columns * PANEL), np.float32)
        self.magnitude = np.zeros(columns * PANEL, np.float32)
        self.largest = np.zeros(columns * PANEL, np.float32)
        self.cross: np.ndarray | None = None
        self._pairs = np.stack(np.triu_indices(columns), 1)
        self._panels = [np.empty((columns, 0, PANEL), np.uint32)] * 2

    def add(self, x: np.ndarray, y: np.ndarray | None = None) -> None:
        """Add a batch of x, and y if given: (tokens, n) uint16 each, the bits of bfloat16 numbers."""
        for start in range(0, len(x), MAX_TOKENS):
            part = slice(start, start + MAX_TOKENS)
            panels = self._packed(0, x[part], self.magnitude, self.largest)
            _multiply(panels, panels, self._pairs, self.products)
            if y is not None:
                if self.cross is None:
                    self.cross = np.zeros_like(self.products)
                others = self._packed(1, y[part], np.empty_like(self.magnitude), np.zeros_like(self.largest))
                _multiply(panels, others, np.argwhere(np.ones((len(panels), len(panels)))), self.cross)

    def _packed(self, which: int, part: np.ndarray, magnitude: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """Lay out a batch in panel buffer `which` (0 for X, 1 for Y), which grows as needed."""
        columns, words = len(self._panels[which]), -(-len(part) // 2)
        if self._panels[which].shape[1] < words:
            self._panels[which] = np.empty((columns, words, PANEL), np.uint32)
        panels = self._panels[which][:, :words]
        bits = largest.view(np.uint32)
        _pack(part, panels, magnitude.reshape(columns, PANEL), bits.reshape(columns, PANEL))
        return panels
