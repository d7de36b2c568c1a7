"""Combining weights: merge methods, out-of-core streaming, kernels, recipes. The floor is laid; nothing stands on it yet."""
