"""What a step of training makes smaller: one file each, found by listing the folder.

An objective is a module with `SUMMARY`, `SOURCE`, `collate(samples, pad)`, which makes a batch of tensors, and
`loss(batch, logits, options)`, which gives a scalar from `logits` [rows, positions, vocabulary] float at the positions
`batch["keep"]`.
"""
