"""The objects of a store: compositions, which hold no time and no author, and commits, which do.

Both are OCI image manifests. A composition's config is its canonical JSON and its layers are the parts, as CNCF
ModelPack layers, so that the same recipe made twice is one object. A commit has the same layers, so that other tools
pull the files of a personality by its name, and refers to the composition as its `subject`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steer.store import blobs
from steer.store.blobs import Descriptor
from steer.store.layout import Store
from vectors.documents.schema import (
    anything,
    excerpt,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    problems_of,
    record,
    text,
    whole,
)  # fmt: skip
from vectors.errors import ArtifactError
from vectors.expression import Composition, Term, parse

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
COMPOSITION = "application/vnd.steer.composition.v1+json"
COMMIT = "application/vnd.steer.commit.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"
SCHEMA = 1
STEERING, TASK = "steering vector", "task vector"


@dataclass(frozen=True)
class Part:
    """One part of a composition: a vector by its digest, and how it acts.

    `kind` is a steering vector, which acts while the model runs, or a task vector, which is added to the weights.
    `strength` None is the strength that the vector recommends.
    """

    name: str
    digest: str
    size: int
    kind: str
    strength: float = 1.0
    operation: str = "add"
    layers: tuple[int, ...] | None = None
    scope: str | None = None
    condition: str | None = None

    def term(self) -> Term:
        """The part as a term of an expression. Raises ExpressionError."""
        written = (f"@{each}" for each in (self.scope, self.condition) if each is not None)
        restricted = parse("x" + "".join(written)).terms[0]
        return replace(restricted, operation=self.operation, name=self.name, value=self.strength, layers=self.layers)


@dataclass(frozen=True)
class Personality:
    """A composition: its base model, its parts in order, and how it is merged, served and evaluated."""

    base: str
    base_digest: str | None = None
    parts: tuple[Part, ...] = ()
    merge: dict[str, Any] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    evals: tuple[dict[str, Any], ...] = ()

    def expression(self) -> Composition:
        """The steering vectors as an expression, whose names are those of the parts. Raises ExpressionError."""
        return parse(str(Composition(tuple(part.term() for part in self.parts if part.kind == STEERING))))

    def of_kind(self, kind: str) -> tuple[Part, ...]:
        """The parts of one kind, in order."""
        return tuple(part for part in self.parts if part.kind == kind)

    def value(self) -> dict[str, Any]:
        """The composition as JSON: equal for equal recipes."""
        value = asdict(self) | {"schema": SCHEMA, "parts": [asdict(part) for part in self.parts]}
        return {key: entry for key, entry in value.items() if entry not in (None, {}, [], ())}


@dataclass(frozen=True)
class Commit:
    """A version: a composition, where it comes from, and who made it, when and how. `digest` is the commit's own."""

    digest: str
    composition: str
    parents: tuple[str, ...]
    message: str
    author: str
    time: float
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first line of the message."""
        return self.message.partition("\n")[0]


NAME = text(r"[^\x00-\x1f\x7f/\\'\"]{1,100}", "a name")  # of a part, which is the name of a file too
_PART = record(
    {
        "name": NAME,
        "digest": text(blobs.DIGEST.pattern, "a digest"),
        "size": whole(0, 2**60),
        "kind": one_of(STEERING, TASK),
    },
    {
        "strength": number,
        "operation": text(r"[a-z_]{1,20}", "an operation"),
        "layers": optional(list_of(whole(0, 100_000))),
        "scope": optional(text(r"[a-z]+(:[0-9]+)?", "a scope")),
        "condition": optional(text(longest=1000)),
    },
)
_COMPOSITION = record(
    {"schema": one_of(SCHEMA), "base": text(r"[\s\S]{1,1000}", "a model")},
    {
        "base_digest": optional(text(blobs.DIGEST.pattern, "a digest")),
        "parts": list_of(_PART, 1000),
        "merge": mapping_of(anything),
        "serve": mapping_of(anything),
        "evals": list_of(mapping_of(anything), 1000),
    },
)
_COMMIT = record(
    {
        "schema": one_of(SCHEMA),
        "composition": text(blobs.DIGEST.pattern, "a digest"),
        "parents": list_of(text(blobs.DIGEST.pattern, "a digest"), 100),
        "message": text(longest=100_000),
        "author": text(longest=1000),
        "time": number,
    },
    {"command": text(longest=100_000), "environment": mapping_of(text(longest=1000))},
)
_DESCRIPTOR = record(
    {"mediaType": text(longest=255), "digest": text(blobs.DIGEST.pattern, "a digest"), "size": whole(0, 2**60)},
    {"annotations": mapping_of(text(longest=4096))},
)
_MANIFEST = record(
    {"schemaVersion": one_of(2), "config": _DESCRIPTOR, "layers": list_of(_DESCRIPTOR, 10_000)},
    {
        "artifactType": text(longest=255),
        "subject": optional(_DESCRIPTOR),
        "annotations": mapping_of(text(longest=4096)),
    },
)


def named(name: str) -> dict[str, str]:
    """The annotations of a layer that is a file of this name: those of OCI and of ModelPack."""
    return {TITLE: name, FILEPATH: name}


def manifest(
    artifact_type: str, config: Descriptor, layers: list[Descriptor], subject: Descriptor | None = None
) -> dict[str, Any]:
    """An OCI image manifest (image-spec 1.1)."""
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": config.value(),
        "layers": [layer.value() for layer in layers],
    }
    return value | ({"subject": subject.value()} if subject else {})


def problems_of_manifest(value: Any) -> list[str]:
    """What is wrong with the value of a manifest."""
    return problems_of(value, _MANIFEST, "manifest")


def problems_of_commit(value: Any) -> list[str]:
    """What is wrong with the value of a commit, which is the config of its manifest."""
    return problems_of(value, _COMMIT, "commit")


def read_manifest(store: Store, digest: str, artifact_type: str | None = None) -> dict[str, Any]:
    """A manifest, of this type if one is given. Raises ArtifactError."""
    value = blobs.read_json(store, digest)
    problems = problems_of_manifest(value)
    if not problems and artifact_type not in (None, value.get("artifactType")):
        problems = [f"it is a {excerpt(value.get('artifactType'))}, not a {artifact_type}"]
    if problems:
        raise ArtifactError([f"{digest}: {problem}" for problem in problems], "check the store: steer verify")
    return value


def read_commit(store: Store, digest: str) -> Commit:
    """A commit by its digest. Raises ArtifactError."""
    value = _config(store, digest, COMMIT, _COMMIT)
    return Commit(
        digest, value["composition"], tuple(value["parents"]), value["message"], value["author"], value["time"],
        value.get("command", ""), value.get("environment", {}),
    )  # fmt: skip


def read_composition(store: Store, digest: str) -> Personality:
    """A composition by its digest. Raises ArtifactError."""
    value = _config(store, digest, COMPOSITION, _COMPOSITION)
    parts = tuple(
        Part(**{**part, "layers": None if part.get("layers") is None else tuple(part["layers"])})
        for part in (
            {key: each[key] for key in Part.__dataclass_fields__ if key in each} for each in value.get("parts", [])
        )
    )
    return Personality(
        value["base"], value.get("base_digest"), parts, value.get("merge", {}), value.get("serve", {}),
        tuple(value.get("evals", [])),
    )  # fmt: skip


def written_document(store: Store, commit: str) -> str:
    """`personality.yaml` of a commit, as it was written. Raises ArtifactError."""
    for layer in read_manifest(store, commit, COMMIT)["layers"]:
        if layer["mediaType"] == WEIGHT_CONFIG:
            try:
                return blobs.read(store, layer["digest"]).decode()
            except UnicodeDecodeError as error:
                raise ArtifactError(f"personality.yaml of {commit} is no text: {error}", "take another one") from error
    raise ArtifactError(f"the commit {commit} holds no personality.yaml", "check the store: steer verify")


def _config(store: Store, digest: str, artifact_type: str, schema: Any) -> dict[str, Any]:
    value = blobs.read_json(store, read_manifest(store, digest, artifact_type)["config"]["digest"])
    problems = problems_of(value, schema)
    if problems:
        raise ArtifactError([f"{digest}: {problem}" for problem in problems], "check the store: steer verify")
    return value


def descriptor_of(value: dict[str, Any]) -> Descriptor:
    """The descriptor in a manifest."""
    return Descriptor(value["mediaType"], value["digest"], value["size"], value.get("annotations", {}))
