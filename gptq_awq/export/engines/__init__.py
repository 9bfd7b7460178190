"""Inference engines, each in its own Python environment, that compute logits from a checkpoint for comparison."""

from gptq_awq.export.engines.run import (
    ENGINES,
    Comparison,
    Engine,
    EngineAnswer,
    FormatSupport,
    answer,
    compare,
    engine_version,
    find,
    tokenize,
)

__all__ = [
    "ENGINES",
    "Comparison",
    "Engine",
    "EngineAnswer",
    "FormatSupport",
    "answer",
    "compare",
    "engine_version",
    "find",
    "tokenize",
]
