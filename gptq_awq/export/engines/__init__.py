"""Real engines, each in an environment of its own, asked for the logits they compute from a checkpoint."""

from gptq_awq.export.engines.run import ENGINES, Comparison, Engine, EngineAnswer, Runs, answer, compare, find

__all__ = ["ENGINES", "Comparison", "Engine", "EngineAnswer", "Runs", "answer", "compare", "find"]
