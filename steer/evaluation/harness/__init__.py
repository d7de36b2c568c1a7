"""Tasks of lm-evaluation-harness, on the models and arms of an evaluation (the extra `eval`)."""
