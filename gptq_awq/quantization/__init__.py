"""The block loop: each block is transformed, its linears are quantized onto their grids, tuned and kept."""
