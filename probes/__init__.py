"""Measuring a model: contrasting examples, activations, extraction methods, judgement, steering through hooks."""
