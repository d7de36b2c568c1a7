"""The statistics of an experiment: intervals and p-values that hold at every look, and the decision that follows."""
