"""Ways to add a constant to the residual stream by weights alone: one file each, found by listing the folder.

A route is a module with `ORDER` (the lower is tried first), `SUMMARY`, `refusal(draft, layout)` (why this model can't
take it, or None) and `edit(draft, layout, added)`, where `added` [hidden] float64 by layer is what each block's output
gains.
"""

from __future__ import annotations

from types import ModuleType

from vectors.plugins import choose, discover

GROUP = "steer.fold_routes"


def available() -> dict[str, ModuleType]:
    """Every route by name, in the order in which they are tried."""
    found = discover(__name__, GROUP)
    return dict(sorted(found.items(), key=lambda item: item[1].ORDER))


def find(name: str) -> ModuleType:
    """The route of that name. Raises UsageError."""
    return choose("route", name, available())
