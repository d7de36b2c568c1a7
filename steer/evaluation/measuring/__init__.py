"""Measuring: the figures of every arm on every item, and how far an arm moves the model elsewhere."""
