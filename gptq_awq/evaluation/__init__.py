"""Evaluation of a quantized model against full precision: perplexity, KL, agreement, lm-eval; see `evaluate`."""
