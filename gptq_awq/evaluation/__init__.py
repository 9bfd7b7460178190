"""Scores of a model beside its full-precision self: perplexity, KL, agreement, lm-eval; see `evaluate`."""
