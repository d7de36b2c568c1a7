"""vLLM without a server: given texts are scored, and prompts answered, in one batch of differently steered requests."""
