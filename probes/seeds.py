"""Randomness: child seeds are hashes of a name, so results do not depend on order, threads or device."""

from __future__ import annotations

import hashlib


def child_seed(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on `seed` and the text of `names` alone, such as ("bootstrap",) or ("fold", 3)."""
    text = "\0".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
