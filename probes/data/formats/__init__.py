"""The forms that a line of examples can take, one per file, discovered in this folder.

_protocol.py says what a form must define. An outside package adds one through the entry point `steer.example_formats`.
"""

from __future__ import annotations

from typing import cast

from probes.data.formats._protocol import ExampleFormat
from vectors.registry.plugins import discover


def available() -> dict[str, ExampleFormat]:
    """The forms by name."""
    return cast(dict[str, ExampleFormat], discover(__name__, "steer.example_formats"))
