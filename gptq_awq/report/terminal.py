"""Tables of runs for a terminal: as many columns as its width has room for, the most telling ones first."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from gptq_awq.report import escape
from gptq_awq.report.table import Cell, Table

LAST = {"reduction": 1, "peak memory": 2, "quantize": 3, "total": 4, "size": 5}
"""Columns that are left out first where the width is too small, in this order; then metrics, from the last one."""
GAP = 2


def terminal_table(table: Table, width: int) -> RichTable:
    """Tabulate one model's runs for a terminal of `width` characters.

    Settings and bits per weight are always there. Best values are bold, and ≈ marks ties with them, as in Markdown.
    """
    same = _alike(table)
    kept = _fitting(table, width, same)
    told = [f"{name} {table.cells[0][index].text}" for index, name in same.items()]
    title = Text(", ".join(map(escape.one_line, [table.model, *told])))
    made = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for index in kept:
        name, kind = table.columns[index]
        made.add_column(_heading(name), justify="left" if kind == "setting" else "right", no_wrap=True)
    for cells in table.cells:
        made.add_row(*(Text(_shown(cells[index]), "bold" if cells[index].best else "") for index in kept))
    if len(kept) + len(same) < len(table.columns):
        left = [escape.one_line(name) for i, (name, _) in enumerate(table.columns) if i not in kept and i not in same]
        made.caption, made.caption_justify = Text(f"not shown: {', '.join(left)}", "dim"), "left"
    return made


def _shown(cell: Cell) -> str:
    return f"{escape.one_line(cell.text)}{' ≈' if cell.ties else ''}{' =' if cell.same else ''}"


def _heading(name: str) -> str:
    return escape.one_line(name).replace(" [95%]", "")


def _alike(table: Table) -> dict[int, str]:
    """Index and name of the settings that all of several runs have in common, which the title can say."""
    if len(table.cells) < 2:
        return {}
    settings = {i: name for i, (name, kind) in enumerate(table.columns) if kind == "setting" and name != "method"}
    return {i: name for i, name in settings.items() if len({row[i].text for row in table.cells}) == 1}


def _fitting(table: Table, width: int, told: Mapping[int, str]) -> list[int]:
    """Indices of the columns that fit, in their order."""
    widths: Mapping[int, int] = {
        index: GAP + max(cell_len(_heading(name)), *(cell_len(_shown(row[index])) for row in table.cells), 1)
        for index, (name, _) in enumerate(table.columns)
    }
    kept, order = [index for index in widths if index not in told], _dispensable(table.columns)
    while order and sum(widths[index] for index in kept) > width:
        kept.remove(order.pop(0))
    return kept


def _dispensable(columns: Sequence[tuple[str, str]]) -> list[int]:
    """Indices of the columns that may be left out, the first to go first."""
    costs = [i for i, (name, _) in enumerate(columns) if name in LAST]
    costs.sort(key=lambda i: LAST[columns[i][0]])
    metrics = [i for i, (_, kind) in enumerate(columns) if kind in ("metric", "difference")]
    telling = [i for i in metrics if columns[i][0].endswith("/kl")] + [i for i in metrics if "ppl" in columns[i][0]]
    return [*costs, *reversed([i for i in metrics if i not in telling]), *reversed(telling[1:])]
