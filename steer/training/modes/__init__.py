"""Ways of training a bake: one file each. Each gives a `Mode` (steer/training/bake.py) from what the user named."""
