"""Merge methods: one file each, found by listing the folder, and through the entry point `steer.merge_methods`.

A method is a module with

    SUMMARY, SOURCE   what it does, and the paper or tool it comes from
    SPACE             "delta": it combines deltas against the base, and its result is a delta
                      "weight": it combines weights; "either": deltas where there is a base
    BASE              "needed", "optional" or "unused"
    INPUTS            the least and greatest number of inputs, None for any
    OPTIONS           a tuple of vectors.options.Option
    combine(tensor, block, prepared)   the elements of one piece, float64 (see merges/engine/tensor_task.py)
    or fusion(tensor, prepared)        the same as a Fusion (merges/engine/fused.py), run in one compiled pass; None
                                       where combine is to be called

and may have `prepare(tensor)`, whose result is given to every `combine` and `fusion`; `UNIT` ("element", "row" or
"tensor": what a piece must not cut; a string or a function of the options); `SYMMETRIC` (default True: the order of the
inputs has no meaning); `GLOBAL` (it counts with `scope: global`); `NORMALIZED(options)` (whether it divides by the sum
of the weights); `check(tensor)` (what is wrong with the numbers, as sentences); `EXTRAS` (names of files that each
input brings beside its weights, with `extra_shape(shape)`, and `EXTRAS_FOR_ALL` False where parameters may lack them).
"""

from __future__ import annotations

from types import ModuleType

from vectors.plugins import choose, discover

GROUP = "steer.merge_methods"


def available() -> dict[str, ModuleType]:
    """Every method, built in or from outside, by name."""
    return discover(__name__, GROUP)


def find(name: str) -> ModuleType:
    """The method of that name. Raises UsageError that guesses what was meant."""
    return choose("merge method", name, available())
