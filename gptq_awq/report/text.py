"""Number formatting shared by all tables."""

import math
from collections.abc import Mapping
from typing import Any

from gptq_awq.report.rows import distinguishable

NOT_DISTINGUISHABLE = "not distinguishable"


def number(value: float | None, sign: str = "", digits: str = "") -> str:
    """Format a number with four significant digits, three if signed: 22.15, 0.03120, +2.92, inf; None is empty."""
    if value is None:
        return ""
    digits = digits or ("#.3g" if sign else "#.4g")
    return f"{value:{sign}{digits}}".rstrip(".")


def spread(value: float | None, deviation: float | None, sign: str = "") -> str:
    """Format a mean and its standard deviation, `22.152 ± 0.043`, both with two significant digits of the latter."""
    if value is None or not deviation or not math.isfinite(deviation):
        return number(value, sign)
    digits = decimals(deviation)
    return f"{value:{sign}{digits}} ± {deviation:{digits}}"


def difference(metrics: Mapping[str, Any], name: str) -> str:
    """Format a difference from full precision with its 95% interval, if there is one: `+2.92 [+2.71, +3.12]`."""
    delta, interval = metrics.get(f"{name}/delta"), metrics.get(f"{name}/delta_ci95")
    if delta is None:
        return ""
    if not interval:
        return number(delta, sign="+") if delta else "0"
    low, high = interval
    if low == high == 0:  # full precision against itself
        return "0"
    digits = decimals(high - low)
    delta, low, high = (number(value, "+", digits) for value in (delta, low, high))
    return f"{delta} [{low}, {high}]"


def marked_difference(metrics: Mapping[str, Any], name: str) -> str:
    """Format a metric's difference, followed by a line "not distinguishable" where its interval contains 0."""
    text = difference(metrics, name)
    known = text not in ("", "0") and metrics.get(f"{name}/delta_ci95")
    return f"{text}\n{NOT_DISTINGUISHABLE}" if known and not distinguishable(metrics, name) else text


def decimals(width: float) -> str:
    """Format specification that shows two significant digits of an interval's `width`."""
    return f".{max(0, 1 - math.floor(math.log10(width)))}f" if 0 < width < math.inf else ""


def size(count: float | None) -> str:
    """Format a number of bytes in MB or GB; None is empty."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds(value: float | None) -> str:
    """Format seconds, `52.5 s`; None is empty."""
    return "" if value is None else f"{value:.1f} s"


def reduction(count: float | None, baseline: float | None) -> str:
    """Format the size reduction from full precision, `66.7%`; empty where a size is not known."""
    return f"{1 - count / baseline:.1%}" if count is not None and baseline else ""


def group(count: float) -> str:
    """Format a group size: `group 64`, or `per channel` for -1."""
    return "per channel" if count == -1 else f"group {count:g}"
