"""Text that a model writes: prompts, greedy continuations, and where two models' continuations part."""
