"""Tables rendered as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptq_awq.report import escape
from gptq_awq.report.escape import after_tex_break, one_line, spreadsheet, tex
from gptq_awq.report.rows import measured
from gptq_awq.report.settings import flat
from gptq_awq.report.table import Cell, Table
from gptq_awq.report.text import NOT_DISTINGUISHABLE
from gptq_awq.report.verdicts import Verdict, Verdicts

PREAMBLE = r"""% Needs \usepackage{booktabs,graphicx}. \input it, or run pdflatex on it as it is.
\expandafter\ifx\csname @nodocument\endcsname\relax\let\finish\relax\else
\documentclass{article}\usepackage{booktabs,graphicx}\usepackage[margin=15mm,landscape]{geometry}
\begin{document}\def\finish{\end{document}}\fi
"""


def markdown(tables: Iterable[Table], warnings: Sequence[str] = ()) -> str:
    """Render warnings, then one Markdown table per model with its notes."""
    parts = [f"**Warning:** {escape.markdown(warning)}" for warning in warnings]
    for table in tables:
        notes = "  \n".join(map(escape.markdown, table.notes))
        parts += [f"### {escape.markdown(table.model)}", _markdown_table(table), notes]
    return "\n\n".join(part for part in parts if part)


def _markdown_table(table: Table) -> str:
    lines = [[escape.markdown(name) for name, _ in table.columns], [":---"] + ["---:"] * (len(table.columns) - 1)]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = escape.markdown(cell.text)
    text = f"**{text}**" if cell.best else text
    return text + (" ≈" if cell.ties else "") + (f" {NOT_DISTINGUISHABLE}" if cell.same else "")


def latex(tables: Iterable[Table], warnings: Sequence[str] = ()) -> str:
    """Render one booktabs `table` environment per model, without times; † marks "not distinguishable"."""
    comments = "".join(f"% Warning: {one_line(warning)}\n" for warning in warnings)
    return PREAMBLE + comments + "\n".join(map(_latex_table, tables)) + "\\finish\n"


def _latex_table(table: Table) -> str:
    shown = [index for index, (_, kind) in enumerate(table.columns) if kind != "cost"]
    rows, before = [], None
    for run, row in zip(table.runs, table.cells, strict=True):
        if before is not None and run["bits"] != before:
            rows.append(r"\addlinespace")
        before = run["bits"]
        rows.append(after_tex_break(" & ".join(_latex_cell(row[index]) for index in shown) + r" \\"))
    marks = [r"$\dagger$: not distinguishable from full precision."] if _has_same(table) else []
    notes = " ".join([*map(tex, table.notes), *marks])
    aligned = "".join("r" if _numeric(table, index) else "l" for index in shown)
    return "\n".join(
        [
            r"\begin{table}\centering\footnotesize",
            rf"\caption{{{tex(table.model)}. {notes}}}",
            rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            after_tex_break(" & ".join(_latex_heading(table.columns[index][0]) for index in shown) + r" \\"),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _latex_heading(name: str) -> str:
    """Break a heading such as `Δ wikitext2/ppl@2048` into two lines: the text or task, and the metric."""
    text, _, metric = name.rpartition("/")
    if not text or name == "bits/weight":
        return tex(name)
    delta = "Δ " if text.startswith("Δ ") else ""
    return rf"\shortstack[r]{{{tex(text.removeprefix('Δ '))}\\{after_tex_break(tex(delta + metric))}}}"


def _has_same(table: Table) -> bool:
    return any(cell.same for row in table.cells for cell in row)


def _numeric(table: Table, index: int) -> bool:
    return all(isinstance(row[index].value, (int, float)) for row in table.cells if row[index].text)


def _latex_cell(cell: Cell) -> str:
    text = tex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (r"\,$\approx$" if cell.ties else "") + (r"\,$^\dagger$" if cell.same else "")


def tidy(tables: Iterable[Table], verdicts: Verdicts) -> str:
    """Render CSV: one row per run, unrounded numbers, p-values beside their metrics (`NAME/p`, `NAME/p_best_holm`)."""
    rows = [_tidy_row(run, verdicts) for table in tables for run in table.runs]
    file = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(file, lineterminator="\n")
    lines = [keys, *([row.get(key) for key in keys] for row in rows)]
    writer.writerows([spreadsheet(cell) for cell in line] for line in lines)
    return file.getvalue()


def _tidy_row(run: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    plain = ("path", "model", "method", "grid", "bits", "group_size", "sym", "act", "kv")
    sizes = ("bits_per_weight", "size_bytes", "baseline_size_bytes", "peak_memory_bytes")
    row = {key: run[key] for key in plain + sizes} | ({"runs": run["count"]} if "count" in run else {})
    for name, value in run["metrics"].items():
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        row |= {f"{name}/low": value[0], f"{name}/high": value[1]} if pair else {name: value}
    row |= {f"{name}/sd": value for name, value in run.get("spread", {}).items()}
    for name in measured(run["metrics"]):
        verdict = verdicts.get((run["path"], name), Verdict())
        for key in ("p", "p_holm", "best", "p_best", "p_best_holm"):
            row[f"{name}/{key}"] = getattr(verdict, key)
    row |= {f"seconds/{phase}": value for phase, value in run["seconds"].items()}
    return row | {f"config/{key}": value for key, value in flat(run["config"]).items()}
