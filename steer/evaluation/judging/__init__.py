"""Language models as judges of generated texts, over an OpenAI-compatible HTTP interface; and how far to trust them."""
