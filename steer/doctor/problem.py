"""A problem of an installation, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """What is wrong, and the next step. No command can run before a fatal one is solved."""

    what: str
    hint: str
    fatal: bool = False
