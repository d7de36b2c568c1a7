"""Sweeps: layers, strengths and methods at equal cost, chosen on development items and measured again on test items."""
