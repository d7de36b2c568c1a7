"""Baking a behaviour into weights: exactly where algebra allows it, by training where not, proved either way."""
