"""Combining weights: merge methods, out-of-core streaming, kernels, recipes. Nothing stands on this floor yet."""
