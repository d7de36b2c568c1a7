"""Many compositions on the same completions: what does not depend on a composition is computed once."""
