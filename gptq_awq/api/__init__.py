"""The library, for notebooks: quantize a weight or a model in memory, save it, compare it, load it again.

from gptq_awq import load_quantized, quantize_model

quantized = quantize_model(model, texts, method="gptq", bits=4, tokenizer=tokenizer, damping=0.1)
quantized.save("DIR", format="gptq", tokenizer=tokenizer)
model = load_quantized("DIR")
"""

from gptq_awq.api.methods import load_method
from gptq_awq.api.model import QuantizedModel, load_quantized, quantize_model
from gptq_awq.api.observing import SiteInput, observe_moments, with_weights
from gptq_awq.api.weight import quantize_weight

__all__ = [
    "QuantizedModel",
    "SiteInput",
    "load_method",
    "load_quantized",
    "observe_moments",
    "quantize_model",
    "quantize_weight",
    "with_weights",
]
