"""Steering inside vLLM: admission, slots, and the hooks in the front end, the scheduler and the worker."""
