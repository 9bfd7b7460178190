"""Names that stored configs may have from before modules moved: rewritten when a stored run is computed again."""

import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "gptq_awq.data.(WikiText2|HubText|LocalText)": r"gptq_awq.data.corpora.\1",
    "gptq_awq.pipeline.method": "gptq_awq.quantization.method",
    "gptq_awq.pipeline.experts": "gptq_awq.calibration.expert_policy",
    "gptq_awq.self_calibration": "gptq_awq.calibration.self_calibration",
    "gptq_awq.tracking": "gptq_awq.experiment.sweeps.tracking",
    "gptq_awq.sweep.SweepEnd": "gptq_awq.experiment.sweeps.callbacks.SweepEnd",
    "gptq_awq.plugins.SweepFolder": "gptq_awq.experiment.sweeps.callbacks.SweepBegin",
}
"""Pattern of a `_target_`'s beginning → what stands there today."""


def current_targets(node: Any) -> Any:
    """A config, as plain maps and lists, whose `_target_`s are today's names."""
    if isinstance(node, Mapping):
        return {key: _renamed(v) if key == "_target_" else current_targets(v) for key, v in node.items()}
    return [current_targets(item) for item in node] if isinstance(node, list) else node


def _renamed(target: Any) -> Any:
    for old, new in RENAMED.items():
        if isinstance(target, str) and (found := re.match(rf"{old}(?=\.|$)", target)):
            return found.expand(new) + target[found.end() :]
    return target
