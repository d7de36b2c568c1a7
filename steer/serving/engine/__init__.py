"""Steering inside vLLM: admission, slots, hooks of the scheduler, the worker and the front end."""
