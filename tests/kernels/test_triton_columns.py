"""Laws of the Triton kernels, held on CPUs by Triton's interpreter, on a GPU where there is one.

Triton decides when it is imported whether it interprets, once for a process. So all that is interpreted runs in a
process of its own, and this one's Triton stays as it is.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from torch import Tensor

from gptq_awq.grids.arithmetic import KINDS, Arithmetic
from gptq_awq.grids.floats import FLOAT_TYPES
from gptq_awq.grids.table import LEVELS
from gptq_awq.kernels import columns, gpu

BENCHMARK = ROOT / "benchmarks" / "gpu.py"
CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not CUDA or find_spec("triton") is None, reason="no CUDA device, or no Triton")
ARITHMETICS = (
    Arithmetic("affine", 15),
    Arithmetic("minimum", 15),
    Arithmetic("table", 15, LEVELS["nf4"]),
    Arithmetic.of_float(FLOAT_TYPES["e2m3"]),
)
kinds = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=KINDS)


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of this module where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
    assert "TRITON_INTERPRET" not in os.environ
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Block:
    """A column block to round, from column `first` on."""

    arithmetic: Arithmetic
    w: Tensor
    u: Tensor
    scale: Tensor
    zero: Tensor
    first: int

    @classmethod
    def random(cls, arithmetic: Arithmetic, rows: int, width: int, first: int, count: int) -> "Block":
        draw = torch.Generator().manual_seed(rows + width)
        w = torch.randn(rows, width, generator=draw)
        u = 0.2 * torch.randn(width, width, generator=draw).triu(1) + torch.eye(width)
        scale = 0.05 + 0.2 * torch.rand(rows, count, generator=draw)
        scale[0, 0] = 0  # holds one value only
        zero = torch.randint(0, 16, (rows, count), generator=draw).float()
        return cls(arithmetic, w, u, scale, -1.0 - zero / 16 if arithmetic.kind == "minimum" else zero, first)

    @property
    def rounded(self) -> slice:
        return slice(self.first, self.first + self.scale.shape[1])


Swept = tuple[Tensor, Tensor, Tensor]
"""Codes and errors of the columns that were rounded; weights of those after them."""


def swept(block: Block, sweep) -> Swept:
    """What `sweep(w, u, scale, zero, max_code, kind, levels, first, codes, errors)` makes of a block."""
    w, arithmetic = block.w.clone(), block.arithmetic
    codes, errors = torch.full_like(w, -1), torch.full_like(w, -1)
    levels, kind = w.new_tensor(arithmetic.levels), KINDS.index(arithmetic.kind)
    stacks = (x[None] for x in (w, block.u, block.scale, block.zero))
    sweep(*stacks, arithmetic.max_code, kind, levels, block.first, codes[None], errors[None])
    outside = torch.ones(w.shape[1], dtype=torch.bool)
    outside[block.rounded] = False
    assert (codes[:, outside] == -1).all()
    assert (errors[:, outside] == -1).all()
    return codes[:, block.rounded], errors[:, block.rounded], w[:, block.rounded.stop :]


def swept_by_triton(block: Block) -> Swept:
    from gptq_awq.kernels.triton_columns import sweep_columns

    return swept(block, sweep_columns)


def swept_by_numba(block: Block) -> Swept:
    def sweep(w, u, scale, zero, max_code, kind, levels, first, codes, errors):
        w, u, scale, zero, levels, codes, errors = (
            x.numpy() for x in (w, u, scale.contiguous(), zero.contiguous(), levels, codes, errors)
        )
        columns.sweep_columns(w, u, scale, zero, np.float32(max_code), kind, levels, first, codes, errors)

    return swept(block, sweep)


def swept_plainly(block: Block) -> Swept:
    """The equations, one column after the other."""
    w, codes, errors = block.w.clone(), [], []
    for k, i in enumerate(range(block.rounded.start, block.rounded.stop)):
        params = block.scale[:, k : k + 1], block.zero[:, k : k + 1]
        codes.append(block.arithmetic.encode(w[:, i : i + 1], params))
        errors.append((w[:, i : i + 1] - block.arithmetic.decode(codes[-1], params)) / block.u[i, i])
        w[:, i + 1 :] -= errors[-1] * block.u[i, i + 1 :]
    return torch.cat(codes, 1), torch.cat(errors, 1), w[:, block.rounded.stop :]


def assert_equal(a: Swept, b: Swept) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.cpu(), y.cpu())


@needs_triton
@kinds
@pytest.mark.parametrize(("rows", "width", "first", "count"), [(9, 32, 0, 32), (5, 40, 0, 40), (6, 24, 7, 11)])
def test_the_sweep_equals_the_plain_loop_and_the_cpu_kernel_bit_for_bit(
    interpreter, arithmetic, rows, width, first, count
):
    block = Block.random(arithmetic, rows, width, first, count)
    ours = interpreter(swept_by_triton, block)
    assert_equal(ours, swept_plainly(block))
    assert_equal(ours, swept_by_numba(block))


def swept_together(blocks: list[Block]) -> list[Swept]:
    """The same by Triton, of several blocks in one launch, as stacks."""
    from gptq_awq.kernels.triton_columns import sweep_columns

    w, u, scale, zero = (torch.stack([getattr(b, name) for b in blocks]) for name in ("w", "u", "scale", "zero"))
    codes, errors, arithmetic = torch.empty_like(w), torch.empty_like(w), blocks[0].arithmetic
    kind, levels = KINDS.index(arithmetic.kind), w.new_tensor(arithmetic.levels)
    w, u, scale, zero = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (w, u, scale, zero))  # any strides
    sweep_columns(w, u, scale, zero, arithmetic.max_code, kind, levels, 0, codes, errors)
    return [(codes[i], errors[i], w[i, :, w.shape[2] :]) for i in range(len(blocks))]


@needs_triton
@kinds
def test_stacks_in_one_launch_are_swept_as_one_by_one(interpreter, arithmetic):
    blocks = [Block.random(arithmetic, 9, 24, 0, 24) for _ in range(3)]
    blocks = [replace(block, w=(i + 1) * block.w, u=block.u / (i + 1)) for i, block in enumerate(blocks)]
    for ours, block in zip(interpreter(swept_together, blocks), blocks, strict=True):
        assert_equal(ours, swept_by_numba(block))


@needs_triton
def test_a_block_in_two_launches_is_the_block_in_one(interpreter):
    whole = Block.random(ARITHMETICS[0], 5, 24, 0, 24)
    codes, errors, _ = interpreter(swept_by_triton, whole)
    head = replace(whole, scale=whole.scale[:, :10], zero=whole.zero[:, :10])
    first = interpreter(swept_by_triton, head)
    rest = torch.cat([torch.zeros(5, 10), first[2]], 1)
    tail = replace(whole, w=rest, scale=whole.scale[:, 10:], zero=whole.zero[:, 10:], first=10)
    second = interpreter(swept_by_triton, tail)
    assert torch.equal(torch.cat([first[0], second[0]], 1), codes)
    assert torch.equal(torch.cat([first[1], second[1]], 1), errors)


def contrary(block: Block) -> Block:
    """The same block as tensors of other strides: column by column, a scale per group."""
    scale, zero = (x[:, :1].expand(block.scale.shape) for x in (block.scale + 0.1, block.zero))
    return replace(block, w=block.w.T.contiguous().T, scale=scale, zero=zero)


@needs_triton
def test_strides_do_not_matter(interpreter):
    block = contrary(Block.random(ARITHMETICS[0], 6, 20, 0, 20))
    assert_equal(interpreter(swept_by_triton, block), swept_plainly(block))


@needs_triton
def test_halves_are_rounded_to_even_and_what_is_far_outside_is_clipped(interpreter):
    numbers = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5, 7.5, 14.5, 2.0**22 + 1, 2.0**24 + 2, 1e30, -3e6, -1e30])
    ones = torch.ones(1, len(numbers))
    block = Block(Arithmetic("affine", 255), numbers[None] / 4, torch.eye(len(numbers)), ones / 4, 3 * ones, 0)
    codes, _, _ = interpreter(swept_by_triton, block)
    assert codes[0].tolist() == [3, 3, 5, 5, 7, 11, 17, 255, 255, 255, 0, 0]


@dataclass(frozen=True)
class Search:
    """Groups of columns and their candidate ranges."""

    arithmetic: Arithmetic
    w: Tensor
    scale: Tensor
    zero: Tensor
    hessian: Tensor | None

    @classmethod
    def random(cls, arithmetic: Arithmetic, groups: int, rows: int, cols: int, with_hessian: bool) -> "Search":
        draw = torch.Generator().manual_seed(cols)
        w = torch.randn(rows, groups + 1, cols, generator=draw)[:, 1:]  # of strides not its own
        extreme = w.abs().amax(2, keepdim=True)
        scale = extreme * torch.linspace(0.6, 1.1, 6) * (1 if arithmetic.kind == "table" else 2 / 15)
        scale = torch.cat([scale, scale], 2)  # ties
        zero = -7.5 * scale if arithmetic.kind == "minimum" else torch.full_like(scale, 8)
        x = torch.randn(groups, 3 * cols, cols, generator=draw) * torch.rand(cols, generator=draw)
        return cls(arithmetic, w, scale, zero, x.mT @ x if with_hessian else None)

    def errors(self) -> Tensor:
        """Of each candidate, (rows, groups, candidates), in double precision."""
        params = self.scale[..., None], self.zero[..., None]
        w = self.w[:, :, None]
        delta = (self.arithmetic.decode(self.arithmetic.encode(w, params), params) - w).double()
        if self.hessian is None:
            return delta.abs().pow(2.4).sum(-1)
        return torch.einsum("rgni,gij,rgnj->rgn", delta, self.hessian.double(), delta)


def searched_by_triton(search: Search) -> Tensor:
    from gptq_awq.kernels.triton_columns import best_range

    best = torch.full(search.w.shape[:2], -1, dtype=torch.int64, device=search.w.device)
    kind, levels = KINDS.index(search.arithmetic.kind), search.w.new_tensor(search.arithmetic.levels)
    best_range(search.w, search.scale, search.zero, search.arithmetic.max_code, kind, levels, search.hessian, best)
    return best


def assert_best(search: Search, chosen: Tensor) -> None:
    """The least error, or as good as that; of equals the first."""
    errors = search.errors()
    got = errors.gather(2, chosen[..., None])[..., 0]
    assert (got <= errors.amin(2) * (1 + 1e-5)).all()
    assert (chosen < errors.shape[2] / 2).all()  # the later half repeats the others
    assert len(chosen.unique()) > 1


@needs_triton
@kinds
@pytest.mark.parametrize("with_hessian", [True, False], ids=["output error", "mse"])
@pytest.mark.parametrize(("groups", "rows", "cols"), [(2, 35, 12), (1, 12, 72)])
def test_the_range_search_finds_the_least_error(interpreter, arithmetic, with_hessian, groups, rows, cols):
    search = Search.random(arithmetic, groups, rows, cols, with_hessian)
    assert_best(search, interpreter(searched_by_triton, search))


def solved(kernels: str) -> list[str]:
    """Hashes of what GPTQ makes of one weight on several grids."""
    from gptq_awq.calibration.moments import Moments
    from gptq_awq.grids.affine import AffineGrid
    from gptq_awq.grids.integer import IntGrid
    from gptq_awq.grids.table import TableGrid
    from gptq_awq.solvers.gptq import GPTQ

    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(9, 52, generator=draw), torch.randn(200, 52, generator=draw)
    moments = Moments(x.T @ x / 200, x.abs().mean(0), 200)
    grids = (
        IntGrid(3, 12),
        IntGrid(3, 12, search="hessian"),
        AffineGrid(4, 20),
        TableGrid("nf4", 16, double_quant=True),
    )
    solvers = [GPTQ(act_order, static, block_size=16) for act_order in (False, True) for static in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "available", lambda device: kernels == "triton")
        cases = [(solver, grid) for solver in solvers for grid in grids]
        cases.append((GPTQ(act_order=True, static_groups=True, block_size=16, refine=1), grids[0]))
        return [solver.solve(w, moments, grid).quantized.sha256() for solver, grid in cases]


@needs_triton
def test_gptq_by_the_gpu_kernels_is_gptq_by_the_cpu_kernels(interpreter):
    assert interpreter(solved, "triton") == solved("numba")


def code_for_hopper(block: int) -> str:
    """The sweep's code as ptxas gets it: it can be compiled where there is no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gptq_awq.kernels import triton_columns

    rows, warps = triton_columns.row_tile(block)
    constants = {"KIND": columns.AFFINE, "LEVELS": 0, "ROWS": rows, "BLOCK": block}
    names = triton_columns._sweep.arg_names
    pointers = {"w", "u", "scale", "zero", "levels", "codes", "errors"}
    kinds = {name: "*fp32" if name in pointers else "fp32" if name == "max_code" else "i32" for name in names}
    source = ASTSource(triton_columns._sweep, kinds | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_a_gpu_divides_as_ieee_says_and_fuses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = code_for_hopper(128)
    divisions = set(re.findall(r"\bdiv\.\S*f32", code))
    assert divisions == {"div.rn.f32"}
    assert not re.findall(r"\bfma\.|\.ftz\.|\.approx\.", code)
    assert {"mul.rn.f32", "sub.rn.f32"} <= set(re.findall(r"\w+\.rn\.f32", code))  # what ptxas may not fuse


def test_kernels_run_on_cuda_devices_with_triton_only(monkeypatch):
    assert not gpu.available(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert not gpu.available(torch.device("cuda"))
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    assert gpu.available(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert not gpu.available(torch.device("cuda"))


def test_without_triton_everything_but_the_kernels_is_there():
    program = """
import sys, torch
sys.modules["triton"] = None  # cannot be imported
import gptq_awq.grids.search, gptq_awq.solvers.gptq
from gptq_awq.kernels import gpu
sys.exit(gpu.available(torch.device("cuda")))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def moved(case, device: str):
    """A block or search with its tensors on another device."""
    tensors = {name: x.to(device) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, **tensors)


@needs_gpu
@pytest.mark.gpu
@kinds
@pytest.mark.parametrize(
    ("rows", "width", "first", "count"), [(515, 128, 0, 128), (67, 100, 20, 33), (70, 512, 0, 512)]
)
def test_on_a_gpu_the_sweep_equals_the_cpu_kernel_bit_for_bit(arithmetic, rows, width, first, count):
    block = Block.random(arithmetic, rows, width, first, count)
    assert_equal(swept_by_triton(moved(block, "cuda")), swept_by_numba(block))


@needs_gpu
@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("with_hessian", [True, False], ids=["output error", "mse"])
def test_on_a_gpu_the_range_search_finds_the_least_error(arithmetic, with_hessian):
    search = Search.random(arithmetic, 3, 200, 128, with_hessian)
    assert_best(search, searched_by_triton(moved(search, "cuda")).cpu())


@pytest.mark.slow
@pytest.mark.fresh
def test_the_benchmark_takes_every_step_at_toy_size_without_a_gpu(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    written = (tmp_path / "gpu.md").read_text()
    assert written == done.stdout
    steps = ("q, o", "k, v", "gate, up", "down", "128 × 160", "topology", "forward and moments", "factor", "solve")
    assert all(f"\n| {step} |" in written for step in (*steps, "**quantize_model**, ledger included"))
    codes = [
        line.split("|")[6].strip() for line in written.splitlines() if re.search(r"\d × \d+ \| .* \| \d+ \|$", line)
    ]
    assert codes == ["0"] * 4


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
@pytest.mark.slow
@pytest.mark.fresh
def test_the_benchmark_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, str(BENCHMARK)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "there is no CUDA device here; --device cpu --tiny" in done.stderr
