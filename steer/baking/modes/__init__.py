"""Ways of training a bake: one file each. Each gives a `Mode` (steer/baking/bake.py) from what the user named."""
