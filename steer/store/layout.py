"""The folder of a store: an OCI image layout, with the names, and the record of their moves, beside it.

.steer/
  oci-layout  index.json  blobs/sha256/<hex>     the OCI image layout (image-spec 1.1), which oras and registries read
  HEAD                                           the branch that commits go to
  refs/heads|tags|aliases/…                      names, each a file that holds a digest
  moves.jsonl                                    every move of a name, so that each can be undone
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vectors.documents import json_text
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.locks import Busy, locked

FOLDER = ".steer"
HOME = "STEER_HOME"
FILE = "personality.yaml"
PATIENCE = 60.0  # seconds to wait for a process that changes the store


class Store(NamedTuple):
    """A store: its folder, and the working folder, which holds `personality.yaml`."""

    root: Path
    work: Path

    @property
    def file(self) -> Path:
        """The file that people edit."""
        return self.work / FILE

    @property
    def blobs(self) -> Path:
        """The folder of the blobs."""
        return self.root / "blobs" / "sha256"


def index(manifests: list[dict[str, object]]) -> dict[str, object]:
    """An OCI image index of descriptors."""
    return {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}


def find(start: Path | None = None) -> Store | None:
    """The store that `STEER_HOME` names, or the nearest `.steer` from a folder upward; None if there is none.

    Raises UsageError for a `STEER_HOME` that is no store, ArtifactError for a folder that only looks like one.
    """
    here = Path(start or Path.cwd()).absolute()
    home = home_of_store()
    if home is not None:
        if not (home / "oci-layout").is_file():
            raise UsageError(f"{HOME}={home} is not a store", f"make it: steer init, or unset {HOME}")
        work = next((folder for folder in (here, *here.parents) if (folder / FILE).is_file()), here)
        return _checked(Store(home, work))
    for folder in (here, *here.parents):
        if (folder / FOLDER / "oci-layout").is_file():
            return _checked(Store(folder / FOLDER, folder))
    return None


def require(start: Path | None = None) -> Store:
    """The store of `find`. Raises UsageError where there is none."""
    store = find(start)
    if store is None:
        raise UsageError(f"there is no store here: no {FOLDER} in this folder or above it", "make one: steer init")
    return store


@contextlib.contextmanager
def changing(store: Store) -> Iterator[None]:
    """A context in which no other process changes the names of the store. Raises OutputError after `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with locked(store.root / "moves"):
                yield
                return
        except Busy as busy:
            if time.monotonic() > until:
                doubt = f" ({busy.doubt})" if busy.doubt else ""
                raise OutputError(
                    f"another process is changing {store.root}{doubt}", "wait for it to end, then run this again"
                ) from busy


def home_of_store() -> Path | None:
    """The folder that `STEER_HOME` names, if it is set."""
    home = os.environ.get(HOME)
    return Path(home).expanduser().absolute() if home else None


def _checked(store: Store) -> Store:
    value = json_text.read_object(store.root / "oci-layout", ArtifactError, "it is not a store of steer")
    if value.get("imageLayoutVersion") != "1.0.0":
        raise ArtifactError(
            f"{store.root / 'oci-layout'} has the layout version {value.get('imageLayoutVersion')!r}, not '1.0.0'",
            "a newer version of steer may read it",
        )
    return store
