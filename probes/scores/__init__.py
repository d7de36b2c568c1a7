"""What is measured of a model: one score per file."""
