"""The streaming engine: jobs, a pool of threads, readers, kernels, the fused pass, and its counterpart on a GPU."""
