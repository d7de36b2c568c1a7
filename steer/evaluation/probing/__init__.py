"""`steer probe`: training, testing and applying probes, thresholds for gates, and what goes on inside of a model."""
