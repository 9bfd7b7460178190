"""For notebooks: a small model with its text, and plots that colour-blind readers and grey printers can tell apart.

Which model is the environment's choice, in the words of run.py's command line:

    GPTQ_AWQ_NOTEBOOK="model=local model.path=DIR data=local data.path=FILE eval.perplexity.path=FILE"

Without it, it is the default model of run.py and WikiText-2.
"""

import io
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import ArrayLike
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.report.looks import MARKS, PALETTE, known_look, look_of
from gptq_awq.runtime.configs import CONFIGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLE = "GPTQ_AWQ_NOTEBOOK"
SIZES = ("data.samples=16", "data.seqlen=256", "eval.perplexity.seqlen=256", "eval.perplexity.windows=8")
DPI = 180
"""Twice the pixels of a page, for screens that have them."""


@dataclass(frozen=True)
class Example:
    """A model and its text.

    Attributes:
        name: of the model.
        model: in float32, in eval mode.
        calibration: token ids to quantize with.
        held_out: other token ids, to score on.
    """

    name: str
    model: PreTrainedModel = field(repr=False)
    calibration: TokenSet = field(repr=False)
    held_out: TokenSet = field(repr=False)


def options() -> list[str]:
    """The options that the environment chooses, for run.py's command line."""
    return shlex.split(os.environ.get(VARIABLE, ""))


def example(*overrides: str) -> Example:
    """The model and text that `options()` choose, small enough for a notebook.

    Args:
        overrides: options that win over those, such as `data.samples=64`.

    Raises:
        UserError: as a run with these options would.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides=[*SIZES, *options(), *overrides])
    data, evaluation = (instantiate(node, _convert_="all") for node in (config.data, config.eval))
    loaded = instantiate(config.model, _convert_="all").load(dtype="float32", device="cpu")
    (held_out,) = evaluation.token_sets(loaded.tokenizer)
    return Example(loaded.name, loaded.model, data.tokens(loaded.tokenizer, seed=config.seed), held_out)


# Plots


@dataclass(frozen=True)
class Plot:
    """A figure that a notebook shows as a picture; `figure` is matplotlib's, to change or to save."""

    figure: "Figure"

    def _repr_png_(self) -> bytes:
        """The whole picture, in all its colours."""
        drawn = io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=DPI)
        return drawn.getvalue()

    def __repr__(self) -> str:
        return f"Plot({self.figure.axes[0].get_title(loc='left')!r})"


@dataclass(frozen=True)
class Line:
    """One line: x, y and, where there are intervals, their ends. All of one length."""

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


def lines(
    series: Mapping[str, Line],
    title: str,
    x: str,
    y: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    style: Literal["line", "line and points", "points"] = "line and points",
) -> Plot:
    """Lines by name, or clouds of points. `x` and `y` are the axes' labels, with units.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = _figure(title, x, y)
    for (name, line), (colour, marker) in zip(series.items(), _looks(series), strict=True):
        look: dict[str, Any] = {"color": colour, "linewidth": 1.5, "markersize": 5}
        if style != "line":
            look["marker"] = marker
        if style == "points":
            look |= {"linestyle": "none", "alpha": 0.6, "markersize": 3.5}
        axes.plot(line.x, line.y, label=name, **look)
        if line.low is not None and line.high is not None:
            axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    _legend(figure, axes, series)
    return Plot(figure)


def bars(
    series: Mapping[str, Mapping[str, float]], title: str, x: str, y: str, *, log_y: bool = False, digits: str = ""
) -> Plot:
    """Bars by category, side by side where there are several series: {series: {category: height}}.

    `digits` is a format such as `.3f` for the numbers above the bars; by default there are none.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = _figure(title, x, y)
    categories = list(dict.fromkeys(category for heights in series.values() for category in heights))
    width = 0.8 / len(series)
    for i, ((name, heights), (colour, _)) in enumerate(zip(series.items(), _looks(series), strict=True)):
        at = [k + (i - (len(series) - 1) / 2) * width for k, category in enumerate(categories) if category in heights]
        drawn = axes.bar(at, [heights[c] for c in categories if c in heights], width, label=name, color=colour)
        if digits:
            axes.bar_label(drawn, fmt=f"{{:{digits}}}", fontsize=8, padding=2)
    turned = max(map(len, categories)) * len(categories) > 60
    axes.set_xticks(
        range(len(categories)), categories, rotation=35 if turned else 0, ha="right" if turned else "center"
    )
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12 if digits else 0.05)
    if log_y:
        axes.set_yscale("log")
    _legend(figure, axes, series)
    return Plot(figure)


def image(
    values: Any,
    title: str,
    x: str,
    y: str,
    label: str,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    row_step: float = 1,
) -> Plot:
    """A matrix as colours, dark for little; `label` says, with its unit, of what.

    Args:
        values: (rows, columns), anything that becomes an array; NaN stays white.
        title: of the plot.
        x: what the columns are.
        y: what the rows are.
        label: what the colours are.
        rows: the rows' names; where there are none, they are numbered.
        columns: the columns' names.
        row_step: what a row counts for in their numbers.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = _figure(title, x, y)
    axes.grid(visible=False)
    drawn = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.yaxis.set_major_formatter(lambda row, _: f"{row * row_step:g}")
    if rows:
        axes.set_yticks(range(len(rows)), rows)
    if columns:
        axes.set_xticks(range(len(columns)), columns)
    figure.colorbar(drawn, ax=axes, label=label)
    return Plot(figure)


def _looks(names: Iterable[str]) -> list[tuple[str, str]]:
    """Colour and mark of each series: methods look as they do everywhere, anything else takes the next ones.

    Of several variants of a method all have its colour, and each a mark of its own.
    """
    names, taken = list(names), list[str]()
    if not all(known_look(name.partition(",")[0]) for name in names):
        return [(PALETTE[i % len(PALETTE)][0], MARKS[i % len(MARKS)]) for i in range(len(names))]
    for name in names:
        own = look_of(name).marker
        taken.append(own if own not in taken else next((mark for mark in MARKS if mark not in taken), own))
    return [(look_of(name).colour, mark) for name, mark in zip(names, taken, strict=True)]


def _figure(title: str, x: str, y: str) -> tuple["Figure", Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install gptq_awq[plots]") from error
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, linewidth=0.6)
    return figure, axes


def _legend(figure: "Figure", axes: Any, names: Iterable[str]) -> None:
    """None for one series; of many, beside or below the plot, where it hides nothing and takes least room."""
    names = list(names)
    if len(names) > 3:
        if max(map(len, names)) > 12:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        else:
            figure.legend(loc="outside right center", frameon=False)
    elif len(names) > 1:
        axes.legend(frameon=False)
