"""Makes a new, empty store."""

from __future__ import annotations

import os
from pathlib import Path

from steer.store import layout, refs
from steer.store.layout import FOLDER, Store
from vectors.errors import OutputError
from vectors.storage.files import canonical_json, write_atomically


def create(work: Path, branch: str) -> Store:
    """A new, empty store in the working folder (or at `STEER_HOME`), on a branch. Raises OutputError, UsageError."""
    head = refs.branch(branch).name
    store = Store(layout.home_of_store() or work / FOLDER, work)
    if os.path.lexists(store.root / "oci-layout"):
        raise OutputError(f"{store.root} is a store already", "what is in it: steer status, steer log")
    for folder in (store.blobs, *(store.root / "refs" / kind for kind in ("heads", "tags", "aliases"))):
        folder.mkdir(parents=True, exist_ok=True)
    if refs.target(store, refs.HEAD) is None:
        refs.point(store, {refs.HEAD: head}, "steer init")
    # Last: a folder without this file is no store, so that an interrupted creation can be repeated.
    write_atomically(store.root / "oci-layout", canonical_json({"imageLayoutVersion": "1.0.0"}).encode())
    return store
