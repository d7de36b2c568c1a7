"""What a merge writes: a model folder, its shards and card, an adapter."""
