"""Export of quantized models to the checkpoint formats of inference engines, and their verification."""
