"""A remote in an OCI registry (distribution-spec 1.1): one repository for each personality.

`oci://host/team` and the personality tone are the repository host/team/tone. Its tags are `latest` for the branch and
the labels of tags and aliases, so that other tools pull by them; the tag `steer-names` is an index of all names and all
versions, which is what `steer pull` reads, and which keeps a registry from collecting the versions before the newest.
In a registry without the referrers API, what is attached to a composition is also listed under the tag
`sha256-<its digest>` (the referrers tag schema of the specification), where other tools look for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.store import layout
from steer.store.blobs import LARGEST_DOCUMENT, Descriptor
from steer.store.objects.model import MANIFEST
from steer.store.remotes._protocol import SUBJECT, Object
from steer.store.remotes.files import REF, attached_in, names_in
from vectors.documents import json_text
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import canonical_json, digest_bytes, new_file

NAMES = "steer-names"
INDEX = "application/vnd.oci.image.index.v1+json"


class Registry:
    """An OCI registry; who may write comes from the configuration that `docker login` and `oras login` write."""

    def __init__(self, place: str, name: str) -> None:
        try:
            import oras.provider
        except ImportError as error:
            raise UsageError("oci:// needs the package oras", "pip install 'steer-workbench[oci]'") from error
        host, _, path = place.strip("/").partition("/")
        if not host or not path:
            raise UsageError(f"oci://{place} names no repository", "such as oci://registry.example/team")
        self.host, self.repository = host, f"{path}/{name}"
        self.index = b""
        local = host.partition(":")[0] in ("localhost", "127.0.0.1")
        self.scheme = "http" if local else "https"
        self.client = oras.provider.Registry(hostname=host, insecure=local)

    def names(self) -> dict[str, str]:
        """The names in the index `steer-names`; none where there is none."""
        self._require_reachable()
        response = self._request("GET", f"manifests/{NAMES}", headers={"Accept": INDEX})
        if response.status_code == 404:
            return {}
        self._require(response, 200)
        self.index = response.content[: LARGEST_DOCUMENT + 1]
        return names_in(self.index, f"the index {self.repository}:{NAMES}")

    def attached(self) -> dict[str, Descriptor]:
        """What the index lists as attached to compositions. Raises ArtifactError."""
        return attached_in(self.index, f"the index {self.repository}:{NAMES}") if self.index else {}

    def missing(self, objects: Sequence[Object]) -> list[Object]:
        """Those that the repository does not have."""
        return [item for item in objects if not self._has(item)]

    def put(self, item: Object, path: Path) -> None:
        """Upload a blob, or a manifest by its digest."""
        if item.manifest:
            self._put_manifest(item.digest, path.read_bytes(), MANIFEST)
            return
        with self._reporting():
            container = self.client.get_container(f"{self.host}/{self.repository}")
            layer = {"digest": item.digest, "size": item.size, "mediaType": item.media_type}
            response = self.client.upload_blob(str(path), container, layer)
        self._require(response, 200, 201)

    def get(self, item: Object, target: Path) -> None:
        """Download a blob or a manifest."""
        kind = "manifests" if item.manifest else "blobs"
        headers = {"Accept": f"{MANIFEST}, {INDEX}"} if item.manifest else {}
        response = self._request("GET", f"{kind}/{item.digest}", headers=headers, stream=True)
        self._require(response, 200)
        most, received = item.size or LARGEST_DOCUMENT, 0
        with self._reporting(), new_file(target) as file:
            for part in response.iter_content(1024**2):
                received += len(part)
                if received > most:  # an answer without an end would fill the disk
                    raise ArtifactError(
                        f"the registry sends more than the {most} bytes of {item.digest}", "push to it again"
                    )
                file.write(part)

    def point(
        self, names: Mapping[str, str], tips: Mapping[str, Sequence[Object]], files: Mapping[str, Path],
        attached: Mapping[str, Descriptor],
    ) -> None:  # fmt: skip
        """Write the tags for other tools, and last the index of all names."""
        self._list_referrers({key: each for key, each in attached.items() if key not in self.attached()})
        described: list[dict[str, Any]] = []
        listed: set[str] = set()
        for name, digest in sorted(names.items()):
            manifests = {item.digest: item for item in tips.get(name, ())}
            label = name.partition(":")[2] or name.partition("@")[2] or "latest"
            if digest in manifests:
                content = self._manifest(digest)
                self._put_manifest(label, content, MANIFEST)
            size = manifests[digest].size if digest in manifests else len(self._manifest(digest))
            described.append(Descriptor(MANIFEST, digest, size, {REF: name}).value())
            for item in manifests.values():
                if item.digest not in names.values() and item.digest not in listed:
                    listed.add(item.digest)
                    described.append(Descriptor(MANIFEST, item.digest, item.size).value())
        described += [each.value() for _, each in sorted(attached.items())]
        self._put_manifest(NAMES, canonical_json(layout.index(described)).encode(), INDEX)

    def _list_referrers(self, new: Mapping[str, Descriptor]) -> None:
        """List these under the tags of their subjects, beside what is there, if the registry does not do it itself."""
        by_subject: dict[str, list[str]] = {}
        for digest, each in sorted(new.items()):
            by_subject.setdefault(each.annotations[SUBJECT], []).append(digest)
        if not by_subject or self._request("GET", f"referrers/{next(iter(by_subject))}").status_code == 200:
            return
        for subject, digests in by_subject.items():
            tag = subject.replace(":", "-")
            listed = self._listed(tag)
            for digest in digests:
                if all(each.get("digest") != digest for each in listed):
                    content = self._manifest(digest)
                    kind = str(json_text.parse(content).get("artifactType"))
                    listed.append(Descriptor(MANIFEST, digest, len(content)).value() | {"artifactType": kind})
            self._put_manifest(tag, canonical_json(layout.index(listed)).encode(), INDEX)

    def _listed(self, tag: str) -> list[dict[str, Any]]:
        """The descriptors of the index under a tag; none where there is none. Raises ArtifactError."""
        response = self._request("GET", f"manifests/{tag}", headers={"Accept": INDEX})
        if response.status_code == 404:
            return []
        self._require(response, 200)
        try:
            listed = json_text.parse(response.content[: LARGEST_DOCUMENT + 1])["manifests"]
            if not all(isinstance(each, dict) for each in listed):
                raise ValueError("it lists what is no descriptor")
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"the index {self.repository}:{tag} is damaged: {error}", "remove this tag, then push again"
            ) from error
        return list(listed)

    def _require_reachable(self) -> None:
        """Ask the registry once, since the client tries for half a minute. Raises OutputError."""
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(f"{self.scheme}://{self.host}/v2/", timeout=20).close()
        except urllib.error.HTTPError:  # such as 401: it is there
            return
        except (OSError, ValueError) as error:
            problem = f"{self.host} can't be reached: {getattr(error, 'reason', error)}"
            raise OutputError(problem, "check the address and the network") from error

    def _manifest(self, digest: str) -> bytes:
        response = self._request("GET", f"manifests/{digest}", headers={"Accept": MANIFEST})
        self._require(response, 200)
        if digest_bytes(response.content) != digest:
            raise OutputError(f"{self.host} sent another manifest than {digest}", "check the registry")
        return bytes(response.content)

    def _put_manifest(self, reference: str, content: bytes, media_type: str) -> None:
        response = self._request("PUT", f"manifests/{reference}", data=content, headers={"Content-Type": media_type})
        self._require(response, 200, 201)

    def _has(self, item: Object) -> bool:
        kind = "manifests" if item.manifest else "blobs"
        headers = {"Accept": f"{MANIFEST}, {INDEX}"} if item.manifest else {}
        return bool(self._request("HEAD", f"{kind}/{item.digest}", headers=headers).status_code == 200)

    def _request(self, method: str, path: str, **options: Any) -> Any:
        with self._reporting():
            return self.client.do_request(f"{self.scheme}://{self.host}/v2/{self.repository}/{path}", method, **options)

    def _require(self, response: Any, *codes: int) -> None:
        if response.status_code not in codes:
            raise OutputError(
                f"{self.host} answered {response.status_code} for {self.repository}: {response.text[:200]}",
                "log in: oras login, or docker login" if response.status_code in (401, 403) else "check the registry",
            )

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        import requests

        try:
            yield
        except (requests.RequestException, ValueError) as error:
            raise OutputError(
                f"{self.host} can't be reached: {str(error)[:200]}", "check the address and the network"
            ) from error
