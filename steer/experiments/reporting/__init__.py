"""What an experiment has shown: comparisons with intervals that hold at every interim analysis, and decisions."""
