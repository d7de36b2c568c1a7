"""The worker's kernels for GPUs, in Triton, each with the tensor code that it must equal named as its reference."""
