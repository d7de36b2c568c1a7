"""Documents from untrusted sources: JSON and YAML read within bounds, and the schemas of their values."""
