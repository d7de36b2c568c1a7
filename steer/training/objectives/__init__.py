"""What a training step minimises: one objective per file; see protocol.py for what an objective must have."""
