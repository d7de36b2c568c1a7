"""Evaluations for other tools: logs that Inspect reads, and steering files of lm-evaluation-harness."""
