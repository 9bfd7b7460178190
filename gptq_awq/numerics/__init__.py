"""Numerics below the methods: Cholesky factors, quadratic forms, Hadamard matrices, dtypes, distributed ranks."""
