"""Combining weights: merge methods, out-of-core streaming, kernels, recipes, task vectors in and out."""
