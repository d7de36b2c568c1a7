"""Merge methods: one per file of this folder, or from a package with the entry point group `steer.merge_methods`.

Each file holds one `MergeMethod` (merges/engine/method.py) called METHOD. Code that several methods share is in files
with a leading underscore: `_options`, `_trimming`, `_random_drop`, `_magnitude_drop`, `_combining`, `_sphere`.
"""

from __future__ import annotations

from typing import Any

from merges.engine.method import MergeMethod
from vectors.errors import UsageError
from vectors.registry.plugins import choose, discover

GROUP = "steer.merge_methods"


def available() -> dict[str, MergeMethod]:
    """All methods by name, built-in and of installed packages. Raises UsageError for an entry that is not a method."""
    return {name: _method(name, offered) for name, offered in discover(__name__, GROUP).items()}


def find(name: str) -> MergeMethod:
    """The method of that name. Raises UsageError that suggests the closest name."""
    return choose("merge method", name, available())


def _method(name: str, offered: Any) -> MergeMethod:
    method = getattr(offered, "METHOD", offered)
    if not isinstance(method, MergeMethod):
        raise UsageError(
            f"the merge method {name!r} of an installed package is not a MergeMethod",
            "give its module METHOD = MergeMethod(...), see merges/engine/method.py; or uninstall it",
        )
    if method.name != name:
        raise UsageError(
            f"the merge method offered as {name!r} calls itself {method.name!r}", "use the same name for both"
        )
    return method
