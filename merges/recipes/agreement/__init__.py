"""Whether the inputs of a merge agree: the settings of their configurations, and the ids of their tokens."""
