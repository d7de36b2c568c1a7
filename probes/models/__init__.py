"""Loading a model, where its residual stream is, its tokens, and seeds."""
