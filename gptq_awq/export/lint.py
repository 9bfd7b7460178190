"""Compatibility warnings for the log and the model card: checkpoints that valid formats allow but engines refuse.

The rules are those of vLLM 0.32 and GPTQModel 7.7; engines change faster than the formats do.
"""

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedConfig

from gptq_awq.export.base import LinearSpec
from gptq_awq.export.packing import ragged
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import role_of
from gptq_awq.models.blocks import key_value_heads

FORMATS = ("gptq", "awq", "compressed_tensors")
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one module that vLLM holds as one."""
DEGREES = (1, 2, 4, 8)
ROW_PARALLEL = ("attn_output", "ffn_down")
"""Roles of row-parallel linears, split between devices along the input; all others are split along the output."""


def lint(linears: Sequence[LinearSpec], config: PreTrainedConfig, formats: Collection[str] = FORMATS) -> list[str]:
    """Sentences on the engines that would refuse these checkpoints, and on the possible tensor-parallel degrees.

    Args:
        linears: specifications of the linears to be quantized; the result is empty unless all are on integer grids.
        config: config of the model.
        formats: names of the formats to be exported.
    """
    grids = {linear.grid for linear in linears}
    integers = [grid for grid in grids if isinstance(grid, IntGrid)]
    if not linears or len(integers) < len(grids):
        return []
    natural = all(linear.natural_order for linear in linears)
    whole = not any(ragged(linear) for linear in linears)
    rules = [rule for grid in integers for rule in engine_rules(grid, natural, whole)]
    several = len({grid.without_search() for grid in integers}) > 1
    rules += [
        (
            ("mlx",),
            not all(grid.sym for grid in integers),
            "unquantized parameters are float32, too, as scale times zero point takes it; grid=affine stores 16 bits",
        ),
        (FORMATS, any(linear.expert for linear in linears), "vLLM runs packed experts on a GPU only"),
        (
            ("compressed_tensors",),
            _divided(linears),
            "vLLM needs one grid for q, k and v, and one for gate and up; grid.tie=site ensures it",
        ),
        (
            ("compressed_tensors",),
            several and not all(grid.sym for grid in integers),
            "transformers reads layers on different grids with sym=true only",
        ),
    ]
    said = [f"{name}: {sentence}" for names, holds, sentence in rules for name in names if holds and name in formats]
    lines = list(dict.fromkeys(said))
    return [*lines, tensor_parallel(linears, config)] if set(FORMATS) & set(formats) else lines


def _divided(linears: Sequence[LinearSpec]) -> bool:
    """Whether linears that vLLM joins, q, k and v or gate and up, are on different grids."""
    sites: dict[tuple[str, tuple[str, ...]], set[Grid]] = {}
    for linear in linears:
        module, _, name = linear.name.rpartition(".")
        if site := next((site for site in JOINED if name in site), ()):
            sites.setdefault((module, site), set()).add(linear.grid.without_search())
    return any(len(grids) > 1 for grids in sites.values())


def engine_rules(grid: IntGrid, natural: bool, whole: bool) -> list[tuple[Sequence[str], bool, str]]:
    """Rules as (formats concerned, whether an engine refuses such a checkpoint, sentence to report then).

    Args:
        grid: integer grid of the weights.
        natural: whether all groups consist of neighbouring columns.
        whole: whether the group size divides the width of every linear.
    """
    bits, group = grid.bits, grid.group_size
    return [
        (("gptq",), not grid.sym, "vLLM refuses sym=false; awq and compressed_tensors hold it for vLLM"),
        (("gptq",), bits not in (4, 8), f"vLLM refuses {bits} bits; it takes 4, and 8 on a GPU"),
        (("gptq", "compressed_tensors"), bits == 8, "vLLM takes 8 bits on a GPU, not on a CPU"),
        (
            ("gptq",),
            not natural,
            "vLLM refuses act_order without static groups; method.solver.static_groups=true sets them",
        ),
        (
            ("gptq",),
            group not in (-1, 32, 64, 128),
            f"vLLM refuses group_size={group}; it takes -1, 32, 64 and 128",
        ),
        (("gptq",), not whole, f"vLLM refuses a last group shorter than group_size={group}"),
        (
            ("gptq", "awq"),
            group not in (-1, 16, 32, 64, 128),
            f"GPTQModel, and so transformers, refuses group_size={group}; it takes -1, 16, 32, 64 and 128",
        ),
        (
            ("compressed_tensors",),
            bits not in (4, 8),
            f"vLLM takes {bits} bits on a GPU with its humming kernels only; it takes 4 everywhere",
        ),
        (
            ("compressed_tensors",),
            bits in (3, 5, 6, 7),
            f"libraries before compressed-tensors 0.18 lay out {bits} bits in another way, and can't read these",
        ),
    ]


def tensor_parallel(linears: Sequence[LinearSpec], config: PreTrainedConfig) -> str:
    """Sentence on the tensor-parallel degrees that vLLM can split the model by, and why it can't by the others."""
    obstacles = {degree: obstacle(linears, config, degree) for degree in DEGREES}
    fit = [str(degree) for degree, reason in obstacles.items() if reason is None]
    wont = [f"{degree} won't ({reason})" for degree, reason in obstacles.items() if reason is not None]
    return "; ".join([f"tensor parallel: {', '.join(fit) or 'no number of'} devices fit", *wont])


def obstacle(linears: Sequence[LinearSpec], config: PreTrainedConfig, degree: int) -> str | None:
    """Reason why a model can't be split between `degree` devices; None if it can."""
    heads = getattr(config, "num_attention_heads", None) or degree  # without attention there are none to split
    kv_heads = key_value_heads(config)
    if heads % degree:
        return f"{heads} heads"
    if kv_heads % degree and degree % kv_heads:
        return f"{kv_heads} key-value heads"
    for linear in linears:
        grid = linear.grid
        assert isinstance(grid, IntGrid)
        by_row = role_of(linear.name) in ROW_PARALLEL
        # Where there are fewer key-value heads than devices, heads are copied instead of split.
        parts = min(degree, kv_heads) if re.search(r"(k|v)_proj$", linear.name) else degree
        size = linear.columns if by_row else linear.rows
        if size % parts or size // parts * grid.bits % 32:
            return f"{linear.name}: {size} {'columns' if by_row else 'rows'} in {parts} parts fill no whole words"
        if by_row and grid.group_size != -1 and size // parts % grid.group_size:
            return f"{linear.name}: {size} columns in {parts} parts are no whole groups of {grid.group_size}"
    return None
