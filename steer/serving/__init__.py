"""Steering live traffic: a plugin for stock vLLM, and what `steer serve` starts.

A composition is written into a slot of a table, and every token of a step carries the index of its slot, so cost does
not depend on how many vectors a composition sums or how many compositions a batch mixes. Three processes take part:

    front end     `engine.admission` resolves expressions to vectors by digest; `http` speaks HTTP in front of it
    engine core   `engine.capacity` admits no more compositions than there are slots, and counts what was applied
    worker        `engine.worker` holds the slots, and sets the slot of every token before every step

`engine.plugin` hooks them into vLLM's own classes, through `frontend_hooks`, `scheduler_hooks` and `worker.runners`.
Nothing in `engine` imports `http`.
"""
