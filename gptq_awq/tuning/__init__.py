"""Tunings: gradient-based refinement of a quantized model's scales, codes, norms and biases; one paper per file."""
