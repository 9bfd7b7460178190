"""X Wᵀ of float32 matrices rounded to bfloat16, with float32 sums and results, on CPUs that have dpbf16ps.

torch's bfloat16 product rounds its result too, an error of 0.06 for a logit of 20. Here only the inputs of the product
are rounded, while they are laid out for the instruction (see rank_k.py).
"""

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.rank_k import PANEL, ROWS, add_tile, bfloat16


@compiled
def _pack(x, panels):  # pragma: no cover (compiled)
    """Round x (rows, n) to bfloat16, laid out by PANEL rows: panels (panels, ⌈n/2⌉, PANEL) uint32; zeros beyond."""
    rows, n = x.shape
    for p in numba.prange(len(panels)):
        row = np.zeros(2 * panels.shape[1], np.float32)
        bits = row.view(np.uint32)
        for r in range(PANEL):
            if p * PANEL + r < rows:
                row[:n] = x[p * PANEL + r]
            else:
                row[:] = np.float32(0.0)
            for k in range(panels.shape[1]):
                panels[p, k, r] = bfloat16(bits[2 * k]) | (bfloat16(bits[2 * k + 1]) << np.uint32(16))


@compiled
def _multiply(left, right, out):  # pragma: no cover (compiled)
    """Write left rightᵀ of two packed matrices to out (left panels · PANEL, right panels · PANEL) float32."""
    words, stride = left.shape[1], out.shape[1]
    for index in numba.prange(len(left) * len(right)):
        i, j = index % len(left), index // len(left)  # neighbours share a panel of `right`, which stays in cache
        out[i * PANEL : (i + 1) * PANEL, j * PANEL : (j + 1) * PANEL] = np.float32(0.0)
        for r in range(0, PANEL, ROWS):
            address = out.ctypes.data + 4 * ((i * PANEL + r) * stride + j * PANEL)
            a, b = left[i].ctypes.data + 4 * r, right[j].ctypes.data
            add_tile(a, b, words, address, stride)  # pyright: ignore[reportCallIssue]


def packed(x: np.ndarray) -> np.ndarray:
    """Round x (rows, n) float32 to bfloat16 and lay it out for `product`: (panels, ⌈n/2⌉, PANEL) uint32."""
    panels = np.empty((-(-len(x) // PANEL), -(-x.shape[1] // 2), PANEL), np.uint32)
    _pack(x, panels)
    return panels


def product(left: np.ndarray, rows: int, right: np.ndarray, columns: int) -> np.ndarray:
    """Multiply X Wᵀ in bfloat16 with float32 sums; returns a view (rows, columns) float32.

    Args:
        left: X (rows, n), laid out by `packed`.
        rows: number of rows of X.
        right: W (columns, n), laid out by `packed`.
        columns: number of rows of W.
    """
    out = np.empty((len(left) * PANEL, len(right) * PANEL), np.float32)
    _multiply(left, right, out)
    return out[:rows, :columns]
