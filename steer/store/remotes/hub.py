"""A remote in a repository of the Hugging Face hub: the OCI image layout, with the newest version as files beside it.

One push is one commit of the repository, made against the revision that was read: of two at once, one is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.store import layout
from steer.store.blobs import Descriptor
from steer.store.objects.model import MANIFEST
from steer.store.remotes._protocol import Object
from steer.store.remotes.files import REF, attached_in, names_in
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import canonical_json, copy_content, new_file


class Hub:
    """A repository `user/name`; the token is that of `hf auth login` or HF_TOKEN, the address that of HF_ENDPOINT."""

    def __init__(self, place: str) -> None:
        from huggingface_hub import HfApi

        if place.count("/") != 1:
            raise UsageError(f"hf://{place} names no repository", "such as hf://user/tone")
        self.repository = place
        self.api = HfApi()
        self.revision: str | None = None
        self.operations: list[Any] = []
        self.index = b""

    def names(self) -> dict[str, str]:
        """The names in `index.json`; none where there is no repository or no store in it."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        try:
            with self._reporting():
                self.revision = self.api.repo_info(self.repository).sha
                path = self.api.hf_hub_download(self.repository, "index.json", revision=self.revision)
        except (RepositoryNotFoundError, EntryNotFoundError):
            return {}
        self.index = Path(path).read_bytes()
        return names_in(self.index, f"hf://{self.repository}/index.json")

    def attached(self) -> dict[str, Descriptor]:
        """What the index lists as attached to compositions. Raises ArtifactError."""
        return attached_in(self.index, f"hf://{self.repository}/index.json") if self.index else {}

    def missing(self, objects: Sequence[Object]) -> list[Object]:
        """Those that the repository does not hold with their size."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        there: dict[str, int] = {}
        with contextlib.suppress(RepositoryNotFoundError, EntryNotFoundError), self._reporting():
            for entry in self.api.list_repo_tree(self.repository, "blobs/sha256", revision=self.revision):
                there[entry.path] = getattr(entry, "size", -1)
        return [item for item in objects if there.get(_path(item.digest)) != item.size]

    def put(self, item: Object, path: Path) -> None:
        """Remember an object; all are sent in one commit by `point`."""
        from huggingface_hub import CommitOperationAdd

        self.operations.append(CommitOperationAdd(_path(item.digest), str(path)))

    def get(self, item: Object, target: Path) -> None:
        """Download an object."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with self._reporting():
                path = self.api.hf_hub_download(self.repository, _path(item.digest), revision=self.revision)
        except EntryNotFoundError as error:
            raise ArtifactError(f"hf://{self.repository} holds no {item.digest}", "push to it again") from error
        with new_file(target) as new, Path(path).open("rb") as file:
            copy_content(file, new)

    def point(
        self, names: Mapping[str, str], tips: Mapping[str, Sequence[Object]], files: Mapping[str, Path],
        attached: Mapping[str, Descriptor],
    ) -> None:  # fmt: skip
        """Commit what was put, the names, and the files of the newest version: README.md is the hub's model card."""
        from huggingface_hub import CommitOperationAdd

        sizes = {item.digest: item.size for listed in tips.values() for item in listed}
        listed = [
            Descriptor(MANIFEST, digest, sizes.get(digest, 0), {REF: name}).value()
            for name, digest in sorted(names.items())
        ]
        listed += [each.value() for _, each in sorted(attached.items())]
        contents = {"index.json": layout.index(listed), "oci-layout": {"imageLayoutVersion": "1.0.0"}}
        operations = [
            *self.operations,
            *(CommitOperationAdd(name, canonical_json(value).encode()) for name, value in contents.items()),
            *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
        ]
        with self._reporting():
            if self.revision is None:
                self.api.create_repo(self.repository, exist_ok=True)
            self.api.create_commit(
                self.repository, operations, commit_message="steer push", parent_commit=self.revision
            )
        self.operations = []

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

        try:
            yield
        except (EntryNotFoundError, RepositoryNotFoundError):
            raise
        except (HfHubHTTPError, OSError) as error:
            raise OutputError(
                f"hf://{self.repository} can't be used: {str(error)[:300]}", "log in: hf auth login; or pull first"
            ) from error


def _path(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"
