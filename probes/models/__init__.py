"""Models: loading, where the residual stream is, chat templates, and tokens."""
