"""Baking by training: distillation, fine-tuning on examples, preference optimisation, contrastive difference."""
