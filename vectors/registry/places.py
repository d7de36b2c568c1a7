"""Further places in which expressions find names, behind bindings and before the current folder.

A package above this one adds its own when it is imported, such as the store of versions: a function without arguments
that returns a `vectors.resolve.Resolver`, and imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PLACES: list[Callable[[], Any]] = []
