"""Summary of a quantized model in memory: sizes, and which linears lost most."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from gptq_awq.quantization.footprint import PLAIN_BITS, Footprint
from gptq_awq.quantization.method import Method

WORST = 5


@dataclass(frozen=True)
class ModelReport:
    """Sizes and errors of a quantized model; `str` and notebooks show it as a table.

    Attributes:
        method: name of the method.
        linears: number of quantized linears.
        bits_per_weight: stored bits, scales and zeros included.
        size_bytes: of the whole model, what isn't quantized in 16 bits.
        full_bytes: of the whole model in 16 bits.
        error: mean relative error of the linears' outputs, or of their weights where no data was seen.
        of: what that is an error of: "outputs" or "weights".
        worst: the linears with the largest errors: (name, error).
    """

    method: str
    linears: int
    bits_per_weight: float
    size_bytes: int
    full_bytes: int
    error: float | None
    of: str
    worst: tuple[tuple[str, float], ...]

    @classmethod
    def of_model(
        cls, model: nn.Module, footprint: Footprint, ledger: Sequence[Mapping[str, Any]], method: Method | None
    ) -> Self:
        """Sum up a ledger and a footprint."""
        key = "error_after" if any("error_after" in row for row in ledger) else "weight_error"
        errors = {row["name"]: row[key] for row in ledger if isinstance(row.get(key), float)}
        finite = {name: error for name, error in errors.items() if math.isfinite(error)}
        worst = sorted(finite.items(), key=lambda item: -item[1])[:WORST]
        return cls(
            method="" if method is None else method.name,
            linears=len(footprint.weights),
            bits_per_weight=footprint.bits_per_weight,
            size_bytes=footprint.model_bytes(model),
            full_bytes=sum(p.numel() for p in model.parameters()) * PLAIN_BITS // 8,
            error=sum(finite.values()) / len(finite) if finite else None,
            of="outputs" if key == "error_after" else "weights",
            worst=tuple(worst),
        )

    def __str__(self) -> str:
        return self._repr_markdown_()

    def _repr_markdown_(self) -> str:
        rows = [
            ("method", self.method),
            ("linears", str(self.linears)),
            ("bits per weight", f"{self.bits_per_weight:.3f}"),
            ("size", f"{self.size_bytes / 1e6:.1f} MB of {self.full_bytes / 1e6:.1f} MB in 16 bits"),
            (f"relative error of {self.of}", "" if self.error is None else f"{self.error:.3g}"),
            *((f"worst: {name}", f"{error:.3g}") for name, error in self.worst),
        ]
        return "\n".join(["| | |", "| :--- | :--- |", *(f"| {name} | {value} |" for name, value in rows if value)])
