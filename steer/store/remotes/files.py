"""A remote in a folder, or at any URL that fsspec knows (s3://, gs://, sftp://, memory://): an OCI image layout."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.store import layout
from steer.store.blobs import DIGEST, Descriptor
from steer.store.objects.model import MANIFEST
from steer.store.remotes._protocol import SUBJECT, Object
from vectors.documents import json_text
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import canonical_json

REF = "org.opencontainers.image.ref.name"
LARGEST = 16 * 1024**2  # bytes of index.json


class Files:
    """An OCI image layout at a URL; its names are in `index.json`, which is replaced last and at once."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, self.index = url, b""
        try:
            self.system, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(
                f"{url} can't be opened: {error}", "a folder, or a URL whose fsspec package is installed"
            ) from error

    def names(self) -> dict[str, str]:
        """The names in `index.json`; none where there is no store yet. Raises ArtifactError, OutputError."""
        with self._reporting():
            path = self._path("index.json")
            if not self.system.exists(path):
                return {}
            if self.system.size(path) > LARGEST:
                raise ArtifactError(f"{self.url}/index.json is larger than {LARGEST:,} bytes", "is it a store?")
            content = self.index = self.system.cat_file(path)
        return names_in(content, f"{self.url}/index.json")

    def attached(self) -> dict[str, Descriptor]:
        """What the index lists as attached to compositions. Raises ArtifactError."""
        return attached_in(self.index, f"{self.url}/index.json") if self.index else {}

    def missing(self, objects: Sequence[Object]) -> list[Object]:
        """Those whose blob is not there with its size."""
        with self._reporting():
            return [item for item in objects if not self._has(item)]

    def put(self, item: Object, path: Path) -> None:
        """Send to a temporary name and rename; object stores, which show only whole files, write at once."""
        target = self._path("blobs", "sha256", item.digest.removeprefix("sha256:"))
        with self._reporting():
            self.system.makedirs(posixpath.dirname(target), exist_ok=True)
            if "file" in self._protocols():
                temporary = f"{target}.{os.getpid()}.partial"
                self.system.put_file(str(path), temporary)
                self.system.mv(temporary, target)
            else:
                self.system.put_file(str(path), target)

    def get(self, item: Object, target: Path) -> None:
        """Fetch a blob."""
        source = self._path("blobs", "sha256", item.digest.removeprefix("sha256:"))
        with self._reporting():
            self.system.get_file(source, str(target))

    def point(
        self, names: Mapping[str, str], tips: Mapping[str, Sequence[Object]], files: Mapping[str, Path],
        attached: Mapping[str, Descriptor],
    ) -> None:  # fmt: skip
        """Replace `index.json`."""
        sizes = {item.digest: item.size for listed in tips.values() for item in listed}
        listed = [
            Descriptor(MANIFEST, digest, sizes.get(digest) or self._size(digest), {REF: name}).value()
            for name, digest in sorted(names.items())
        ]
        listed += [each.value() for _, each in sorted(attached.items())]
        with self._reporting():
            self.system.makedirs(self.root, exist_ok=True)
            self._write("oci-layout", {"imageLayoutVersion": "1.0.0"})
            self._write("index.json", layout.index(listed))

    def _write(self, name: str, value: Any) -> None:
        path, content = self._path(name), canonical_json(value).encode()
        if "file" in self._protocols():
            temporary = f"{path}.{os.getpid()}.partial"
            self.system.pipe_file(temporary, content)
            self.system.mv(temporary, path)
        else:
            self.system.pipe_file(path, content)

    def _has(self, item: Object) -> bool:
        path = self._path("blobs", "sha256", item.digest.removeprefix("sha256:"))
        return bool(self.system.exists(path)) and int(self.system.size(path)) == item.size

    def _size(self, digest: str) -> int:
        return int(self.system.size(self._path("blobs", "sha256", digest.removeprefix("sha256:"))))

    def _protocols(self) -> tuple[str, ...]:
        protocol = self.system.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{self.url} holds no {posixpath.basename(str(error.filename or error))}", "push again"
            ) from error
        except OSError as error:
            raise OutputError(
                f"{self.url} can't be used: {error.strerror or error}", "check the place and its rights"
            ) from error


def names_in(content: bytes, where: str) -> dict[str, str]:
    """The names of an OCI index and the digests that they point to. Raises ArtifactError."""
    try:
        value = json_text.parse(content, unique=True)
        found = {}
        for each in value["manifests"]:
            name = (each.get("annotations") or {}).get(REF)
            if isinstance(name, str):
                if not DIGEST.fullmatch(each["digest"]):
                    raise ValueError(f"{json.dumps(each['digest'])[:80]} is not a digest")
                found[name] = each["digest"]
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{where} is damaged: {error}", "push to it again") from error


def attached_in(content: bytes, where: str) -> dict[str, Descriptor]:
    """What an OCI index lists as attached to compositions, by digest. Raises ArtifactError."""
    try:
        found = {}
        for each in json_text.parse(content, unique=True)["manifests"]:
            subject = (each.get("annotations") or {}).get(SUBJECT)
            if isinstance(subject, str):
                if not DIGEST.fullmatch(each["digest"]) or not DIGEST.fullmatch(subject):
                    raise ValueError(f"{json.dumps(each)[:120]} names what is no digest")
                found[each["digest"]] = Descriptor(MANIFEST, each["digest"], int(each["size"]), {SUBJECT: subject})
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{where} is damaged: {error}", "push to it again") from error
