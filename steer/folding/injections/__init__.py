"""Ways to add a constant to the residual stream by weights alone: one per file, discovered in this folder.

An outside package adds one through the entry point `steer.injections`; _protocol.py says what it must define.
"""

from __future__ import annotations

from steer.folding.injections._protocol import Injection as Injection
from vectors.registry.plugins import choose, discover_as

GROUP = "steer.injections"


def available() -> dict[str, Injection]:
    """Every injection by name, in the order in which they are tried."""
    modules: dict[str, Injection] = discover_as(Injection, "injection", __name__, GROUP)
    return dict(sorted(modules.items(), key=lambda item: item[1].ORDER))


def find(name: str) -> Injection:
    """The injection of that name. Raises UsageError, which lists the available ones."""
    return choose("--via", name, available())
