"""The results table that a run prints at its end."""

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gptq_awq.report import text
from gptq_awq.report.rows import measured, total_seconds
from gptq_awq.results import Result

_TOLD_SECONDS = 0.05
"""Phases that would be printed as 0.0 are left out."""


def final_table(result: Result) -> Table:
    """Tabulate one run: size, every metric beside its full-precision value, time and memory."""
    # `Text` and `escape`, as names and errors may contain [brackets], which rich would read as markup.
    table = Table(title=Text(_title(result)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("full precision", justify="right")
    table.add_column(result.method, justify="right")
    table.add_column("difference")
    table.add_row("bits per weight", "", text.number(result.bits_per_weight), "with scales and zeros")
    reduction = text.reduction(result.size_bytes, result.baseline_size_bytes)
    table.add_row(
        "size",
        text.size(result.baseline_size_bytes),
        text.size(result.size_bytes),
        reduction and f"{reduction} smaller",
    )
    for name in measured(result.metrics):
        value, baseline = text.number(result.metrics[name]), text.number(result.metrics.get(f"{name}/baseline"))
        table.add_row(escape(name), baseline, value, text.marked_difference(result.metrics, name))
    longer = {phase: value for phase, value in result.seconds.items() if phase != "total" and value >= _TOLD_SECONDS}
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in longer.items())
    table.add_row("time", "", text.seconds(total_seconds(result.seconds)), phases)
    table.add_row("peak memory", "", text.size(result.peak_memory_bytes))
    if result.forecast is not None:
        seconds, most = result.forecast["seconds"]["total"], result.forecast["peak_memory_bytes"]
        table.add_row("forecast", "", text.seconds(seconds), f"peak memory {text.size(most)}")
    if result.status != "done":
        table.caption = Text(f"{result.status}: {result.error or 'no reason given'}")
    return table


def _title(result: Result) -> str:
    parts = [f"{result.model}: {result.method}"]
    if result.grid not in (None, "int"):
        parts.append(result.grid)
    if result.bits is not None:
        parts.append(f"{result.bits:g} bits")
    if result.group_size is not None:
        parts.append(text.group(result.group_size))
    if result.sym is not None:
        parts.append("symmetric" if result.sym else "asymmetric")
    parts += [f"activations {result.act}"] if result.act else []
    parts += [f"keys and values {result.kv}"] if result.kv else []
    return ", ".join(parts)
