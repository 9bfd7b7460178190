"""Laws of grids."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptq_awq.solvers.gptq as gptq_module
from gptq_awq.calibration.moments import Moments
from gptq_awq.errors import UserError
from gptq_awq.grids import search
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Place, fit_all, group_of_columns, group_spans
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import TYPES, KGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid, dynamic_levels
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

grids = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 7, 16, 64]),
    sym=st.booleans(),
    search=st.sampled_from(["minmax", "mse"]),
    scale_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)


def weights(seed, rows=8, columns=48, scale=1.0):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def one_group(grid, w, H=None):
    """Scale and zero of a weight that is one group."""
    fitted = grid.fit(w, H)
    return fitted.scales, fitted.zeros


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_codes_round_trip(grid, seed, scale):
    w = weights(seed, scale=scale)
    params = one_group(grid, w)
    codes = grid.encode(w, params)
    assert codes.min() >= 0
    assert codes.max() <= grid.arithmetic.max_code
    assert torch.equal(codes, codes.round())
    assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), sym=st.booleans(), seed=st.integers(0, 10**6))
def test_minmax_error_is_within_one_step(bits, sym, seed):
    grid, w = IntGrid(bits, -1, sym), weights(seed)
    params = one_group(grid, w)
    # Half a step inside the range; the symmetric grid clips its largest positive value, by half a step more.
    assert ((grid.decode(grid.encode(w, params), params) - w).abs() <= 1.001 * params[0]).all()


def test_more_bits_never_hurt():
    w = weights(0)
    errors = []
    for bits in range(2, 9):
        errors.append((RTN().solve(w, None, IntGrid(bits, 16)).quantized.dequantize() - w).square().sum())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("sym", [False, True])
def test_range_searches_lower_what_they_minimise(sym):
    w = weights(1)
    x = torch.randn(200, 48) * torch.linspace(0.1, 3, 48)
    H = x.T @ x / 200

    def error(search):
        grid = IntGrid(3, -1, sym, search)
        params = one_group(grid, w, H)
        delta = grid.decode(grid.encode(w, params), params) - w
        return delta.abs().pow(2.4).sum(), ((delta @ H) * delta).sum()

    assert error("mse")[0] < error("minmax")[0]
    assert error("hessian")[1] < error("minmax")[1]


def test_an_all_positive_row_uses_the_whole_symmetric_range():
    w = torch.linspace(0.1, 1, 32)[None]
    grid = IntGrid(4, -1, sym=True)
    params = one_group(grid, w)
    assert (grid.decode(grid.encode(w, params), params) - w).abs().max() <= params[0].max()


def test_a_zero_group_stays_zero():
    for sym in (False, True):
        w = torch.zeros(3, 16)
        grid = IntGrid(4, 16, sym, scale_dtype="float16")
        params = one_group(grid, w)
        assert torch.equal(grid.decode(grid.encode(w, params), params), w)


@pytest.mark.parametrize(("columns", "group_size", "groups"), [(48, 32, 2), (48, 64, 1), (48, -1, 1), (48, 7, 7)])
def test_the_last_group_may_be_shorter(columns, group_size, groups):
    quantized = RTN().solve(weights(2), None, IntGrid(4, group_size)).quantized
    assert quantized.scales.shape == (8, groups)
    size = columns if group_size == -1 else group_size
    assert torch.equal(quantized.group_of_column, torch.arange(columns) // size)


def test_bits_per_weight_counts_scales_and_zeros():
    def bits(**options):
        return RTN().solve(weights(3, columns=128), None, IntGrid(**options)).quantized.bits_per_weight

    assert bits(bits=4, group_size=64, sym=True, scale_dtype="float16") == 4 + 16 / 64
    assert bits(bits=4, group_size=64, sym=False, scale_dtype="float16") == 4 + 20 / 64
    assert bits(bits=3, group_size=-1, sym=False, scale_dtype="float16") == 3 + 19 / 128


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"search": "best"}]
)
def test_what_a_grid_cannot_do_is_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        IntGrid(**options)


ARITHMETICS = [
    Arithmetic("affine", 7),
    Arithmetic("minimum", 7),
    Arithmetic("table", 15, TableGrid("nf4").arithmetic.levels),
]


@pytest.mark.parametrize("with_hessian", [True, False])
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda a: a.kind)
def test_compiled_range_search_finds_what_the_plain_loop_finds(arithmetic, with_hessian):
    w, x = weights(4, rows=200), torch.randn(200, 48) * torch.linspace(0.1, 3, 48)
    H = x.T @ x / 200
    scales = w.abs().amax(1, keepdim=True) / 3 * torch.linspace(0.2, 1.2, 11)
    zeros = torch.full_like(scales, 4) if arithmetic.kind == "affine" else w.amin(1, keepdim=True) * torch.ones(11)
    w[0], w[1] = 0, w[1] * 1e-6
    h = H[None] if with_hessian else None
    plain = search._by_candidate(w, scales, zeros, arithmetic, h)
    compiled = search._by_compiled(w, scales, zeros, arithmetic, h)
    assert (compiled == plain).float().mean() > 0.98  # near ties may fall either way


EVERY = [
    IntGrid(3, 64),
    IntGrid(8, -1, sym=True, scale_dtype="float16"),
    AffineGrid(4, 32),
    SignedGrid(4, 32),
    *(KGrid(kind) for kind in TYPES),
    TableGrid("nf4", 64),
    TableGrid("nf4", 64, double_quant=True),
    TableGrid("fp4", 64),
    TableGrid("iq4_nl", 32),
    TernaryGrid(256),
]


def name(grid):
    kind = getattr(grid, "type", getattr(grid, "table", ""))
    return f"{type(grid).__name__}{kind}{'-double' if getattr(grid, 'double_quant', False) else ''}"


def problem(seed=5, rows=24, columns=512):
    x = torch.randn(800, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 2, columns)
    H = x.T @ x / 800
    return weights(seed, rows, columns), Moments(H, x.abs().mean(0), 800)


@pytest.mark.parametrize("grid", EVERY, ids=name)
def test_every_grid_rounds_to_the_nearest_neighbour(grid):
    W, _ = problem()
    fitted = fit_all(grid, W, None)
    params = fitted.per_column(group_of_columns(512, grid.group_size))
    chosen = (grid.decode(grid.encode(W, params), params) - W).abs()
    for code in range(grid.arithmetic.max_code + 1):
        assert (chosen <= (grid.decode(torch.full_like(W, code), params) - W).abs() + 1e-6).all()


@pytest.mark.parametrize("grid", EVERY, ids=name)
def test_gptq_beats_rounding_on_every_grid(grid):
    W, stats = problem()
    grid = replace(grid, search="hessian")

    def error(solver):
        return quadratic(solver.solve(W, stats, grid).quantized.dequantize() - W, stats.hessian)

    assert error(GPTQ(act_order=True, static_groups=True)) < 0.9 * error(RTN())


@pytest.mark.parametrize("grid", EVERY, ids=name)
def test_compiled_sweep_equals_the_plain_loop_on_every_grid(grid, monkeypatch):
    W, stats = problem()
    compiled = GPTQ().solve(W, stats, grid).quantized
    monkeypatch.setattr(gptq_module, "_round_compiled", gptq_module._round_plain)
    plain = GPTQ().solve(W, stats, grid).quantized
    assert torch.equal(compiled.codes, plain.codes)
    assert torch.equal(compiled.scales, plain.scales)


@pytest.mark.parametrize("grid", EVERY, ids=name)
def test_range_search_never_raises_the_output_error(grid):
    W, stats = problem()

    def error(grid):
        return quadratic(RTN().solve(W, stats, grid).quantized.dequantize() - W, stats.hessian)

    assert error(replace(grid, search="hessian")) <= error(grid.without_search())


@pytest.mark.parametrize("how", ["mse", "hessian"])
@pytest.mark.parametrize(
    ("grid", "levels"),
    [
        *((AffineGrid(bits), levels) for bits, levels in ((4, 16), (5, 16), (5, 27), (8, 16), (8, 30))),
        *((SignedGrid(bits), levels) for bits, levels in ((4, 13), (5, 15), (5, 27), (8, 15))),
    ],
    ids=str,
)
def test_weights_on_a_lattice_of_fewer_levels_are_held_exactly_once_ranges_are_searched(grid, levels, how):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(levels, (64, 96), generator=draw) - levels // 2  # most groups don't reach both ends
    step = torch.randint(32, 64, (64, 3), generator=draw) / 512  # few bits: float16 has room for any multiple
    W = step.repeat_interleave(32, 1) * codes
    assert torch.equal(RTN().solve(W, problem(columns=96)[1], replace(grid, search=how)).quantized.dequantize(), W)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
def test_scales_of_k_quants_are_what_the_block_stores(kind, how):
    W, stats = problem()
    quantized = RTN().solve(W, stats, KGrid(kind, how)).quantized
    store, repeat = quantized.store, 256 // TYPES[kind].sub_block
    d = store["d"].repeat_interleave(repeat, 1)
    assert torch.equal(store["d"], store["d"].half().float())
    assert torch.equal(quantized.scales, d * store["scale_codes"])
    low, high = (0, 2 ** TYPES[kind].scale_bits - 1)
    if not TYPES[kind].minimum:
        low, high = -(2 ** (TYPES[kind].scale_bits - 1)), 2 ** (TYPES[kind].scale_bits - 1) - 1
    codes = [store[key] for key in ("scale_codes", "min_codes") if key in store]
    assert all(torch.equal(c, c.round()) and c.min() >= low and c.max() <= high for c in codes)


def test_k_quants_refuse_widths_that_are_not_whole_blocks():
    with pytest.raises(UserError, match="576 columns, not a multiple of 256"):
        KGrid("q4_k").check_columns(576, "q_proj")


def test_double_quantization_stores_what_it_says():
    W, _ = problem()
    quantized = RTN().solve(W, None, TableGrid("nf4", 64, double_quant=True)).quantized
    store = quantized.store
    nested = store["nested_scales"].flatten().repeat_interleave(256)[: quantized.scales.numel()]
    scales = dynamic_levels()[store["absmax_codes"].flatten()] * nested + store["offset"]
    assert torch.equal(scales.reshape(quantized.scales.shape), quantized.scales)
    plain = RTN().solve(W, None, TableGrid("nf4", 64)).quantized.scales
    assert (quantized.scales / plain - 1).abs().max() < 0.02


def test_ternary_has_three_levels_and_absmean_is_the_mean():
    W, _ = problem()
    quantized = RTN().solve(W, None, TernaryGrid(256)).quantized
    assert quantized.codes.max() == 2
    assert torch.equal(quantized.scales[:, 0], W[:, :256].abs().mean(1).half().float())


def test_mixes_follow_llama_cpp():
    """Types that llama-quantize printed for a Llama of 32 blocks, 4096 wide, with 8 key-value heads of 32."""

    def kind(file_type, name, block, columns=4096, **where):
        grid = LlamaMix(file_type).at(Place(name, columns, block, 32, 4, **where))
        return getattr(grid, "type", None) or f"{type(grid).__name__}{grid.bits}"

    down, value, query = "mlp.down_proj", "self_attn.v_proj", "self_attn.q_proj"
    longer = [i for i in range(32) if kind("q4_k_m", down, i) == "q6_k"]
    assert longer == [0, 1, 2, 3, *range(6, 28, 3), 28, 29, 30, 31]
    assert kind("q4_k_m", query, 0) == "q4_k"
    assert kind("q4_k_m", query, 0, 576) == "SignedGrid5"
    assert kind("q4_k_m", value, 0, 576) == "SignedGrid8"
    assert kind("q2_k", value, 9) == "q4_k"
    assert kind("q3_k_m", down, 1) == "q5_k"
    assert kind("q4_k_m", "lm_head", -1) == "q6_k"
    assert kind("q4_k_m", "model.embed_tokens", -1) == "q4_k"
    assert kind("q4_k_m", "model.embed_tokens", -1, tied=True) == "q6_k"
    assert kind("q8_0", "lm_head", -1) == "SignedGrid8"


@pytest.mark.parametrize(
    "grid",
    [
        *(IntGrid(3, 64, search=search) for search in ("minmax", "mse", "hessian")),
        AffineGrid(4, 32, search="hessian"),
        SignedGrid(4, search="hessian"),
        TernaryGrid(64, search="hessian"),
        TableGrid("nf4", 64, search="hessian"),
        TableGrid("nf4", 64, double_quant=True),
        KGrid("q4_k", search="hessian"),
        KGrid("q3_k", search="mse"),
    ],
    ids=str,
)
def test_spans_fitted_at_once_are_those_fitted_one_by_one(grid):
    generator = torch.Generator().manual_seed(0)
    columns = 512 if isinstance(grid, KGrid) else 300
    W, X = torch.randn(70, columns, generator=generator), torch.randn(600, columns, generator=generator)
    H = X.T @ X / len(X)
    at_once = fit_all(grid, W, H)
    spans = group_spans(columns, grid.span)
    parts = [grid.fit(W[:, a:b], H[a:b, a:b] if grid.needs_hessian else None) for a, b in spans]
    assert torch.equal(at_once.scales, torch.cat([part.scales for part in parts], 1))
    assert torch.equal(at_once.zeros, torch.cat([part.zeros for part in parts], 1))
    for name, stored in at_once.store.items():
        assert torch.equal(stored, torch.cat([part.store[name] for part in parts], 1))
