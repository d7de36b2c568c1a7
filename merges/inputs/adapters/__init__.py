"""Adapters in PEFT's format: what their settings and tensors do to a base, or by which name they are refused."""
