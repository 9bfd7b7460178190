"""The block loop: each block is transformed, its linears solved onto their grids, tuned and kept."""
