"""Numbers as text, alike in all tables."""

import math
from collections.abc import Mapping
from typing import Any

from gptq_awq.report.rows import distinguishable

NOT_DISTINGUISHABLE = "not distinguishable"


def number(value: float | None, sign: str = "", digits: str = "") -> str:
    """Four significant digits, three for a signed difference: 22.15, 0.0312, +2.92, inf; nothing for None."""
    if value is None:
        return ""
    digits = digits or ("#.3g" if sign else "#.4g")
    return f"{value:{sign}{digits}}".rstrip(".")


def spread(value: float | None, deviation: float | None, sign: str = "") -> str:
    """`22.15 ± 0.04`: the deviation's two digits say how many of the mean's are worth showing."""
    if value is None or not deviation or not math.isfinite(deviation):
        return number(value, sign)
    digits = decimals(deviation)
    return f"{value:{sign}{digits}} ± {deviation:{digits}}"


def difference(metrics: Mapping[str, Any], name: str) -> str:
    """`+2.92 [+2.71, +3.12]`, with its 95% interval where there is one."""
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
    """The difference, and on a line of its own that it cannot be told from 0."""
    text = difference(metrics, name)
    known = text not in ("", "0") and metrics.get(f"{name}/delta_ci95")
    return f"{text}\n{NOT_DISTINGUISHABLE}" if known and not distinguishable(metrics, name) else text


def decimals(width: float) -> str:
    """The format that shows two digits of an interval's `width`: as many as the interval has meaning."""
    return f".{max(0, 1 - math.floor(math.log10(width)))}f" if 0 < width < math.inf else ""


def size(count: float | None) -> str:
    """Bytes as MB or GB."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds(value: float | None) -> str:
    """`52.5 s`."""
    return "" if value is None else f"{value:.1f} s"


def reduction(count: float | None, baseline: float | None) -> str:
    """How much smaller than full precision: `66.7%`."""
    return f"{1 - count / baseline:.1%}" if count is not None and baseline else ""


def group(count: float) -> str:
    """`group 64`, `per channel`."""
    return "per channel" if count == -1 else f"group {count:g}"
