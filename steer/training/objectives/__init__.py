"""What a step of training makes smaller: one file each, found by listing the folder.

An objective is a module with `SUMMARY`, `SOURCE`, `collate(samples, pad)`, which makes a batch of tensors
(objectives/divergence.py says which), and `loss(batch, logits, options)`, which gives a scalar from the `logits`
[count, vocabulary] before each token of a completion, row after row.
"""
