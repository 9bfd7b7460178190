"""Anchors: published or earlier values of a metric that runs are expected to reproduce, compared with those measured.

A table of anchors is data: `hydra.callbacks.sweep_end.anchors` of an experiment (configs/experiment/reproduce), read
at the end of its sweep and by `python -m gptq_awq.report ROOT --against reproduce/NAME`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from gptq_awq.errors import UserError
from gptq_awq.report import text
from gptq_awq.report.rows import FULL_PRECISION, Row
from gptq_awq.report.settings import IDENTITY, flat
from gptq_awq.runtime.configs import CONFIGS

_EXPERIMENTS = CONFIGS / "experiment"

KEYS = ("source", "metric", "where", "tolerance", "rows")
AT = ("hydra", "callbacks", "sweep_end", "anchors")
SAME = 1e-4
"""Relative tolerance within which repeated runs of one setting agree: machines sum in different orders."""
Status = Literal["within", "OUTSIDE", "missing", "no figure"]


@dataclass(frozen=True)
class Anchor:
    """The expected value of the metric for one setting.

    Attributes:
        settings: settings of the run: `method`, `bits`, …, or any setting's full name (`data.samples`). With
            `method: fp` the value is that of full precision, which every run stores as NAME/baseline.
        expected: the expected value; None where it is not known yet.
        tolerance: allowed deviation, as a fraction of the expected value.
    """

    settings: Mapping[str, Any]
    expected: float | None
    tolerance: float


@dataclass(frozen=True)
class Anchors:
    """A table of expected values of one metric.

    Attributes:
        source: publication or report that the values come from.
        metric: full name of the metric (`wikitext2/ppl@2048`).
        where: settings that all runs of the table share.
        rows: the expected values.
    """

    source: str
    metric: str
    where: Mapping[str, Any]
    rows: Sequence[Anchor]

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """Build the table from its yaml mapping, as in configs/experiment/reproduce.

        Raises:
            UserError: a missing or unknown key; an expected value or a tolerance that isn't a number.
        """
        if set(table) != set(KEYS):
            raise UserError(f"anchors: give {', '.join(KEYS)}; there is {', '.join(table) or 'nothing'}")
        rows = [_anchor(dict(row), table["tolerance"]) for row in table["rows"]]
        return cls(table["source"], table["metric"], dict(table["where"]), rows)

    @classmethod
    def read(cls, name: str) -> Self:
        """Read the anchors of an experiment, given by its name (`reproduce/opt-125m`) or as a yaml file.

        Raises:
            UserError: no such file, or one without anchors.
        """
        path = Path(name) if name.endswith(".yaml") else _EXPERIMENTS / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"--against {name}: no such experiment; choose among {', '.join(_known())}, or a yaml file")
        node: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in AT:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None:
            raise UserError(f"--against {name}: it has no {'.'.join(AT)}")
        return cls.of(node)


@dataclass(frozen=True)
class Checked:
    """An expected value beside the measured one, `ours`; where that is None, `why` gives the reason."""

    anchor: Anchor
    ours: float | None
    status: Status
    why: str = ""


def check(rows: Iterable[Row], anchors: Anchors) -> list[Checked]:
    """Compare every expected value of `anchors` with that measured in `rows`.

    Raises:
        UserError: several runs fit one setting and differ in the metric by more than `SAME`.
    """
    rows = list(rows)
    return [_check(rows, anchors, anchor) for anchor in anchors.rows]


def met(checked: Iterable[Checked]) -> bool:
    """Whether no value is missing or outside of its tolerance."""
    return all(one.status in ("within", "no figure") for one in checked)


def markdown(checked: Sequence[Checked], anchors: Anchors) -> str:
    """Render the comparison as a Markdown table, followed by a line with the counts of each status."""
    keys = list(dict.fromkeys(key for one in checked for key in one.anchor.settings))
    lines = [[*keys, "expected", "ours", "difference", "tolerance", ""]]
    lines += [[":---"] + ["---:"] * (len(keys) + 3) + [":---"]]
    lines += [_cells(one, keys) for one in checked]
    table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    within, outside, missing, unknown = (sum(one.status == status for one in checked) for status in get_args(Status))
    told = f"{within} of {len(checked)} within tolerance, {outside} outside, {missing} missing"
    told += f", {unknown} without a figure to compare with" if unknown else ""
    return f"### {anchors.metric} against {anchors.source}\n\n{table}\n\n{told}."


def _known() -> list[str]:
    paths = sorted(path for path in _EXPERIMENTS.rglob("*.yaml") if f"{AT[-1]}:" in path.read_text(encoding="utf-8"))
    return [str(path.relative_to(_EXPERIMENTS).with_suffix("")) for path in paths]


def _anchor(row: dict[str, Any], tolerance: Any) -> Anchor:
    if "expected" not in row:
        raise UserError(f"anchors: {row} has no `expected` (null where no figure is known)")
    expected, tolerance = row.pop("expected"), row.pop("tolerance", tolerance)
    numbers = [tolerance] if expected is None else [expected, tolerance]
    if not all(isinstance(number, (int, float)) and number >= 0 for number in numbers):
        raise UserError(f"anchors: {row}: expected={expected} and tolerance={tolerance} must be numbers, at least 0")
    return Anchor(row, expected, tolerance)


def _check(rows: Sequence[Row], anchors: Anchors, anchor: Anchor) -> Checked:
    wanted, name = dict(anchors.where) | dict(anchor.settings), anchors.metric
    if wanted.get("method") == FULL_PRECISION:
        del wanted["method"]
        name = f"{name}/baseline"
    fitting = [row for row in rows if all(_setting(row, key) == value for key, value in wanted.items())]
    done = [row for row in fitting if row["status"] == "done"]
    ours = sorted((row["metrics"][name], row["path"]) for row in done if name in row["metrics"])
    if not ours:
        return Checked(anchor, None, "missing", _why_missing(fitting, done, name))
    (value, first), (most, last) = ours[0], ours[-1]
    if most > value * (1 + SAME):
        raise UserError(f"{first} and {last} both fit {dict(anchor.settings)} and differ: report them apart")
    if anchor.expected is None:
        return Checked(anchor, value, "no figure")
    within = math.isfinite(value) and abs(value - anchor.expected) <= anchor.tolerance * anchor.expected
    return Checked(anchor, value, "within" if within else "OUTSIDE")


def _why_missing(fitting: Sequence[Row], done: Sequence[Row], name: str) -> str:
    if done:
        return f"no {name}"
    return f"failed: {fitting[0]['error']}" if fitting else "no such run"


def _setting(row: Row, key: str) -> Any:
    return row[key] if key == "model" or key in IDENTITY else flat(row["config"]).get(key, "")


def _cells(one: Checked, keys: Sequence[str]) -> list[str]:
    anchor, off = one.anchor, ""
    if one.ours is not None and anchor.expected:
        off = f"{one.ours / anchor.expected - 1:+.1%}"
    figures = [text.number(anchor.expected), text.number(one.ours), off]
    told = f"{one.status} ({one.why})" if one.why else one.status
    return [*(str(anchor.settings.get(key, "")) for key in keys), *figures, f"{anchor.tolerance:.1%}", told]
