"""Steering live traffic: a plugin for stock vLLM, and what `steer serve` starts.

A composition is written into a slot of a table, and every token of a step points at a slot, so cost does not depend on
how many vectors a composition sums or how many compositions a batch mixes. Three processes take part:

    front end     `engine.admission` resolves expressions to vectors by digest; `http` speaks HTTP in front of it
    engine core   `engine.capacity` lets no more compositions live than there are slots, and counts what was applied
    worker        `engine.worker` holds the slots, and points each token at its own before every step

`engine.plugin` joins them to vLLM's own classes, through `frontend_hooks`, `scheduler_hooks` and `worker.runners`.
Nothing in `engine` knows of `http`.
"""
