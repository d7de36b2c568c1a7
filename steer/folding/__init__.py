"""Exact baking: a composition becomes weights by algebra alone, with proof."""
