"""Merge methods: one file each, found by listing the folder, and through the entry point group `steer.merge_methods`.

Each file holds one `MergeMethod` (merges/engine/method.py) called METHOD. What several share has a file of its own with
a leading underscore: `_options`, `_trimming`, `_random_drop`, `_magnitude_drop`, `_combining`, `_sphere`.
"""

from __future__ import annotations

from typing import Any

from merges.engine.method import MergeMethod
from vectors.errors import UsageError
from vectors.plugins import choose, discover

GROUP = "steer.merge_methods"


def available() -> dict[str, MergeMethod]:
    """Every method, built in or from outside, by name. Raises UsageError for an outside one that is no method."""
    return {name: _method(name, offered) for name, offered in discover(__name__, GROUP).items()}


def find(name: str) -> MergeMethod:
    """The method of that name. Raises UsageError that guesses what was meant."""
    return choose("merge method", name, available())


def _method(name: str, offered: Any) -> MergeMethod:
    method = getattr(offered, "METHOD", offered)
    if not isinstance(method, MergeMethod):
        raise UsageError(
            f"the merge method {name!r} of an installed package is no MergeMethod",
            "give its module METHOD = MergeMethod(...), see merges/engine/method.py; or uninstall it",
        )
    if method.name != name:
        raise UsageError(f"the merge method offered as {name!r} calls itself {method.name!r}", "give both one name")
    return method
