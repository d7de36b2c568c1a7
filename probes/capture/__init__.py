"""Activations: one batched forward pass that pools the residual stream of many examples."""
