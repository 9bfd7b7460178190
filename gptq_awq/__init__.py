"""gptq_awq: calibration-based weight quantization of language models.

    from gptq_awq import load_quantized, quantize_model, quantize_weight

The command line is `python run.py`; `gptq_awq.results.load(root)` reads what it stores.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_quantized", "quantize_model", "quantize_weight"]


def __getattr__(name: str) -> Any:
    # Deferred, so that reading results does not import torch and transformers.
    if name in __all__:
        from gptq_awq import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
