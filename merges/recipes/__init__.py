"""What is merged, how, and with which numbers: recipes, mergekit's YAML, and the plan that follows from one."""
