"""Solvers: algorithms that quantize one linear's weight onto a grid; one paper per file."""
