"""Comparing models and compositions on the same evaluation set."""
