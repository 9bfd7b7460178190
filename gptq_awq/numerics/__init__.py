"""Linear algebra on torch tensors: damped Cholesky factors, quadratic forms, Hadamard matrices."""
