"""Saving a quantized model of memory as a checkpoint: checked, written, decoded again, and then put in its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptq_awq.errors import UserError
from gptq_awq.export.base import Source, linear_specs
from gptq_awq.export.formats import FORMATS, make_format
from gptq_awq.export.verify import RECORD, Probe
from gptq_awq.export.write import Exports
from gptq_awq.runtime.options import nearest
from gptq_awq.runtime.source import package_sha256

if TYPE_CHECKING:
    from gptq_awq.api.model import QuantizedModel

PROBE_WINDOWS, PROBE_SEQLEN = 2, 256


def save_model(
    quantized: "QuantizedModel", folder: Path, format_: str, tokenizer: Any, options: Mapping[str, Any]
) -> Path:
    """Write `quantized` as a checkpoint, and return its folder. Raises UserError as `QuantizedModel.save` says."""
    if format_ not in FORMATS:
        raise UserError(f"format={format_}: choose one of {', '.join(FORMATS)}{nearest(format_, FORMATS)}")
    if tokenizer is None:
        raise UserError("tokenizer: a checkpoint needs one: pass tokenizer=… to save, or to quantize_model")
    if folder.exists() and not _replaceable(folder):
        raise UserError(f"{folder}: holds something else than a checkpoint; name a new folder")
    exports = Exports((make_format(format_, options),))
    model: Any = quantized.model
    grids = {name: weight.grid for name, weight in quantized.weights.items()}
    natural = all((weight.group_of_column.diff() >= 0).all() for weight in quantized.weights.values())
    exports.check(linear_specs(model, grids, bool(natural)), model, tokenizer)
    name = Path(getattr(model, "name_or_path", "") or type(model).__name__).name
    windows = quantized.calibration
    ids = torch.arange(64)[None] if windows is None else windows.ids[:PROBE_WINDOWS, :PROBE_SEQLEN]
    probe = Probe.of(model, ids, "token ids 0 to 63" if windows is None else windows.source)
    facts = {
        "model": {"source": name},
        "method": quantized.method and quantized.method.name,
        "calibration": None if windows is None else {"source": windows.source, "sha256": windows.sha256},
        "code": package_sha256(),
    }
    source = Source(model, tokenizer, name, quantized.weights)
    return exports.write_folder(source, folder, probe, facts).path


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / RECORD).is_file())
