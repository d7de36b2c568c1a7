"""The proof, when a model has been loaded, of where its blocks hold the residual stream."""
