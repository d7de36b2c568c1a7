"""Steering live traffic: a plugin for stock vLLM, and what `steer serve` starts.

A composition becomes a row of a table, and every token of a step points at a row (`table`, `blocks`), so cost does not
depend on how many vectors a composition sums or how many compositions a batch mixes. Three processes take part:

    the front end   `admission` pins expressions to vectors by digest; `middleware` and `endpoints` speak HTTP
    the core        `gate` lets no more compositions live than there are rows, and counts what was applied
    the worker      `worker` keeps the rows, and points each token at its own before every step

`plugin` joins them to vLLM's own classes; `runners` holds what its two model runners do differently.
"""
