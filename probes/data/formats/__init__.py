"""The forms that a line of examples can take, one per file, discovered in this folder.

_protocol.py says what a form must define. An outside package adds one through the entry point `steer.example_formats`.
"""

from __future__ import annotations

from probes.data.formats._protocol import ExampleFormat
from vectors.registry.plugins import discover_as


def available() -> dict[str, ExampleFormat]:
    """The forms by name."""
    return discover_as(ExampleFormat, "form of examples", __name__, "steer.example_formats")
