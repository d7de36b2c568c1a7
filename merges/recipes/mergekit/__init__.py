"""Translation of mergekit's YAML into our recipes, with options that reproduce mergekit 0.1.5's results.

Unlike our defaults, mergekit elects signs after weighting, elects + where votes cancel, rescales DARE to the L1 norm of
the delta, divides by the sum of the weights only with `normalize`, matches `filter` anywhere in a name without
wildcards, has no default for `weight` and `t`, and uses a token's given source only for models that lack the token,
unless it is forced.
"""
