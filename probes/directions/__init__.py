"""From activations to a direction: extraction methods, their validation on folds, and a recommendation."""
