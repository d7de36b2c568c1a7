"""Inside vLLM's worker: the slot table, the decoder blocks that read it, and the two model runners."""
