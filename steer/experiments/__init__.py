"""A/B experiments on live traffic: specification, assignment, exposures, feedback, statistics."""
