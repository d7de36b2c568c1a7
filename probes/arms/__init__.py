"""Many compositions on the same completions: what does not depend on a composition is computed once."""

# What steering may cost on neutral text: nats, as the 95th percentile of the KL divergence per token.
BUDGET = 0.1  # of a point that a sweep chooses, which is to be shipped
QUICK_BUDGET = 0.5  # of the strength that an extraction recommends to begin with: a change that readers see
