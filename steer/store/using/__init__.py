"""Versions in use: as expressions and as files, in the weights, promoted, and served."""
