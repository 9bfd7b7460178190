"""Number formats: the grids that weights and activations are rounded to."""
