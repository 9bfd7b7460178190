"""Transforms: changes of basis that preserve the model's function and ease its rounding; one paper per file."""
