"""Training in several processes: data parallel, and weights sharded over them."""
