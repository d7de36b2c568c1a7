"""Linear probes: fitting and calibrating readouts, and what they say of texts, token by token."""
