"""Colours, marks and labels of methods: one table for the report page, matplotlib and notebooks.

Colours are told apart by colour-blind readers, on white and on dark paper; marks tell methods apart in print. A method
that isn't in the table gets a look by its name, which is the same in every report.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

PALETTE = (
    ("#0072b2", "#56a8e0"),
    ("#d55e00", "#f0884a"),
    ("#00825f", "#3fbf95"),
    ("#6a51a3", "#b3a0e8"),
    ("#a87900", "#dcb242"),
    ("#b5528f", "#e08fc0"),
    ("#2a8fa8", "#6fd0e0"),
    ("#6b737c", "#a3abb5"),
)
"""Colours on white and on dark paper."""
INK, MUTED, LINE = ("#1b1f24", "#e4e7eb"), ("#5d656f", "#98a1ac"), ("#d9dde2", "#343a42")
"""Colours of text, of secondary text and of lines, on white and on dark paper."""
MARKS = "osD^vPhX"
"""Marks by matplotlib's letters; the page has paths of the same shapes in the same order (base.js)."""


@dataclass(frozen=True)
class Look:
    """Colour, mark and label of a method.

    Attributes:
        label: in plots.
        hue: index into `PALETTE`.
        mark: index into `MARKS`.
    """

    label: str
    hue: int
    mark: int

    @property
    def colour(self) -> str:
        """Colour on white paper."""
        return PALETTE[self.hue][0]

    @property
    def marker(self) -> str:
        """Mark, by matplotlib's letter."""
        return MARKS[self.mark]


LOOKS: Mapping[str, Look] = {
    "fp": Look("full precision", 7, 0),
    "rtn": Look("round to nearest", 7, 7),
    "gptq": Look("GPTQ", 1, 1),
    "awq": Look("AWQ", 0, 0),
    "awq_gptq": Look("AWQ + GPTQ", 2, 2),
    "awq_qronos": Look("AWQ + Qronos", 2, 4),
    "gptaq": Look("GPTAQ", 4, 3),
    "qronos": Look("Qronos", 5, 4),
    "yaqa": Look("YAQA", 6, 5),
    "fast": Look("fast", 3, 3),
    "best": Look("best", 3, 6),
    "best_3bit": Look("best_3bit", 5, 6),
    "yaqa_distill": Look("yaqa_distill", 6, 6),
    "yaqa_distill_long": Look("yaqa_distill_long", 5, 2),
    "hqq": Look("HQQ", 4, 2),
    "smoothquant": Look("SmoothQuant", 6, 0),
    "smoothquant_gptq": Look("SmoothQuant + GPTQ", 6, 1),
    "quarot": Look("QuaRot + GPTQ", 4, 1),
    "quarot_rtn": Look("QuaRot", 4, 7),
    "gptq_distill": Look("GPTQ distilled", 1, 5),
    "bf16": Look("BF16", 7, 1),
    "fp16": Look("FP16", 7, 2),
}


def known_look(name: str) -> Look | None:
    """Look of a method by its name or its label; None for one that isn't in the table."""
    return LOOKS.get(name) or next((look for look in LOOKS.values() if look.label == name), None)


def look_of(method: str) -> Look:
    """Look of a method, or of a variant of one (`fast, mixed`); of an unknown name, one that depends on it alone."""
    base = method.partition(",")[0].strip()
    known = known_look(base)
    if known is not None:
        return Look(f"{known.label}{method.strip()[len(base) :]}", known.hue, known.mark)
    number = zlib.crc32(base.encode())
    return Look(method, number % (len(PALETTE) - 1), number // 7 % len(MARKS))


def dark_style() -> str:
    """Style sheet for SVG files of matplotlib, whose colours are written in place: the same on dark paper."""
    rules = [
        f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
        for light, dark in (*PALETTE, INK, MUTED, LINE, ("#ffffff", "#14171b"))
        for what in ("fill", "stroke")
    ]
    return f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
