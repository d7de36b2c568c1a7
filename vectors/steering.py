"""SteeringVector: one direction in the residual stream per layer, with metadata about how it was made.

Layer i is the output of decoder block i, counted from 0: `hidden_states[i + 1]` of transformers, but before the
final norm. Strength 1 adds `layers[i]` unscaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vectors import artifact, formats
from vectors.documents.artifacts import SKETCH, STEERING
from vectors.documents.schema import problems_of
from vectors.errors import ArtifactError
from vectors.registry.layers import spans
from vectors.storage.files import digest_bytes, require_writable, write_atomically

KIND = "steering-vector"
FIRST_ROW_HINT = "say it once: steer vectors convert STACK.pt VECTOR.safetensors --first-row embeddings (or block-0)"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions by layer: float32 tensors [hidden] on the CPU, and metadata as JSON values.

    Raises ArtifactError for negative layers, and for tensors that are not finite, one-dimensional and of equal size.
    """

    layers: Mapping[int, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = {
            # A copy: changing the original tensors must not change the vector.
            int(i): torch.as_tensor(self.layers[i]).detach().to("cpu", torch.float32, copy=True)
            for i in sorted(self.layers)
        }
        problems = []
        if not layers:
            problems.append("a steering vector needs at least one layer")
        for i, direction in layers.items():
            if i < 0:
                problems.append(f"layer {i} is negative; layers count from 0")
            if direction.ndim != 1 or direction.numel() == 0:
                problems.append(f"layer {i} has shape {list(direction.shape)}, not [hidden]")
            elif not bool(torch.isfinite(direction).all()):
                problems.append(f"layer {i} holds values that are not finite")
        sizes = sorted({direction.numel() for direction in layers.values()})
        if len(sizes) > 1:
            problems.append(f"the layers have different hidden sizes: {', '.join(map(str, sizes))}")
        if problems:
            raise ArtifactError(problems, "check how the vector was made")
        object.__setattr__(self, "layers", layers)

    @property
    def hidden_size(self) -> int:
        """The size of the residual stream: the length of each direction."""
        return next(iter(self.layers.values())).numel()

    @property
    def apply(self) -> tuple[int, ...]:
        """The layers that act when an expression names none: the metadata's `apply`, or all of them."""
        return tuple(self.metadata.get("apply") or self.layers)

    def acting(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """The layers at which a term of an expression acts: `layers`, those that it names, or else `apply`."""
        return self.apply if layers is None else tuple(layers)

    def mean_at(self, layer: int) -> float | None:
        """The mean projection on the direction at a layer in units of strength, `<h, v> / <v, v>`, over the examples of
        the extraction; None where the file does not record it.
        """
        measured = (self.metadata.get("measured") or {}).get(str(layer))
        mean = measured.get("projection") if isinstance(measured, Mapping) else None
        return float(mean) if isinstance(mean, int | float) and not isinstance(mean, bool) else None

    @property
    def rows(self) -> int | None:
        """The number of rows of a `.pt` stack that did not say whether its first row is the embeddings; else None.

        The stack was read as if it were, so the vector fits only a model of `rows` - 1 layers (`fit.problems_of`).
        """
        rows = self.metadata.get("method", {}).get("rows")
        return rows if type(rows) is int else None

    @property
    def base(self) -> Mapping[str, Any]:
        """The model the vector was extracted from: `digest`, `architecture`, `name` where known. Empty if unknown."""
        return self.metadata.get("base") or {}

    @property
    def digest(self) -> str:
        """`sha256:` of the artifact file that `save` writes."""
        return digest_bytes(self.encode())

    def encode(self) -> bytes:
        """The bytes of the artifact file: a function of the content alone. Raises ArtifactError for odd metadata."""
        if problems := problems_of_metadata(self.metadata):
            raise ArtifactError(problems, "docs/formats.md lists what the metadata of a vector may hold")
        metadata = dict(self.metadata) | {"kind": KIND, "hidden_size": self.hidden_size, "apply": list(self.apply)}
        return artifact.encode({f"layer.{i}": direction for i, direction in self.layers.items()}, metadata)

    def save(self, path: str | Path) -> str:
        """Write the artifact file atomically; return its digest. Raises OutputError."""
        path = Path(path)
        require_writable(path)
        content = self.encode()
        write_atomically(path, content)
        return digest_bytes(content)

    @staticmethod
    def load(path: str | Path) -> SteeringVector:
        """Read a vector in any known format (artifact, GGUF, `.pt`). Raises ArtifactError."""
        return formats.read(Path(path))

    def select(self, layers: Iterable[int]) -> SteeringVector:
        """The vector with only these layers, all of which act. Raises ArtifactError for a layer that it lacks."""
        wanted = sorted(set(layers))
        missing = [i for i in wanted if i not in self.layers]
        if missing:
            raise ArtifactError(
                f"the vector holds no layer {', '.join(map(str, missing))}", f"it holds {spans(self.layers)}"
            )
        return SteeringVector({i: self.layers[i] for i in wanted}, dict(self.metadata) | {"apply": wanted})

    def norm(self) -> dict[int, float]:
        """The Euclidean norm of each direction, by layer."""
        return {i: float(direction.norm()) for i, direction in self.layers.items()}

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """The cosine similarity with another vector at each common layer. Raises ArtifactError if there is none."""
        _require_comparable(self, other)
        shared = [i for i in self.layers if i in other.layers]
        if not shared:
            raise ArtifactError(
                f"the vectors share no layer: {spans(self.layers)} against {spans(other.layers)}",
                "select layers of both",
            )
        cosine = torch.nn.functional.cosine_similarity
        return {i: float(cosine(self.layers[i].double(), other.layers[i].double(), dim=0)) for i in shared}

    def project_out(self, other: SteeringVector) -> SteeringVector:
        """This vector without its component along `other`, at each layer that both have. Raises ArtifactError."""
        _require_comparable(self, other)
        layers = dict(self.layers)
        for i in layers:
            along = other.layers.get(i)
            if along is not None and float(along.norm()) > 0:
                unit = along.double() / along.double().norm()
                layers[i] = (layers[i].double() - (layers[i].double() @ unit) * unit).float()
        # `other` is not applied, so the layers at which it acts do not count.
        metadata = _derived("project_out", (self, 1.0), (other, 1.0)) | {"apply": list(self.apply)}
        return SteeringVector(layers, metadata)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """The sum, as `a + b` in an expression: it acts at every layer where a summand acts.

        At these layers a summand counts only if it acts there itself; at all others both directions are summed. To
        sum both at all layers, `select` them first.
        """
        return _sum(self, 1.0, other, 1.0)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return _sum(self, 1.0, other, -1.0)

    def __mul__(self, strength: float) -> SteeringVector:
        layers = {i: direction * float(strength) for i, direction in self.layers.items()}
        return SteeringVector(layers, _derived("sum", (self, float(strength))))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __repr__(self) -> str:
        name = self.metadata.get("method", {}).get("name", "unknown method")
        contents = f"layers {spans(self.layers)}, hidden size {self.hidden_size}, acts at {spans(self.apply)}"
        return f"SteeringVector({name}, {contents})"


def problems_of_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with the metadata of a vector, by field."""
    return [f"{problem} (in its metadata)" for problem in problems_of(metadata, STEERING)]


def _sum(a: SteeringVector, s: float, b: SteeringVector, t: float) -> SteeringVector:
    """s*a + t*b, with the effect of that expression: at a layer where the sum acts, only vectors that act there count.

    A layer that one of them lacks counts as zero.
    """
    _require_comparable(a, b)
    zero = torch.zeros(a.hidden_size)
    union = sorted({*a.layers, *b.layers})
    acting = {*a.apply, *b.apply}

    def part(vector: SteeringVector, i: int) -> Tensor:
        return zero if i in acting and i not in vector.apply else vector.layers.get(i, zero)

    layers = {i: s * part(a, i) + t * part(b, i) for i in union}
    return SteeringVector(layers, _derived("sum", (a, s), (b, t)))


def _derived(operation: str, *parts: tuple[SteeringVector, float]) -> dict[str, Any]:
    """The metadata of a vector computed from others, which are recorded as its parents with their strengths."""
    first = parts[0][0]
    rows = {vector.rows for vector, _ in parts}
    if len(rows) > 1:
        raise ArtifactError(
            f"{' and '.join(f'a stack of {count} rows' if count else 'a vector' for count in rows)} are combined, and "
            "whether the first row of a stack is the embeddings or block 0 is not known",
            FIRST_ROW_HINT,
        )
    method = {"name": operation} | ({"rows": rows.pop()} if rows != {None} else {})
    metadata: dict[str, Any] = {
        "method": method,
        "parents": [{"digest": vector.digest, "strength": strength} for vector, strength in parts],
        "apply": sorted({i for vector, _ in parts for i in vector.apply}),
    }
    for key in ("base", "licence"):
        if key in first.metadata:
            metadata[key] = first.metadata[key]
    for key in ("data", "chosen_on"):
        if examples := _examples([vector.metadata.get(key) for vector, _ in parts]):
            metadata[key] = examples
    return metadata


def _examples(recorded: Iterable[Any]) -> dict[str, list[str]]:
    """The digests of examples and prompts that any of several vectors records, so that they stay out of a test.

    The smallest digests of all together are what one vector would record of all examples.
    """
    entries = [each for each in recorded if isinstance(each, Mapping)]
    examples: dict[str, list[str]] = {}
    for key in ("example_digests", "prompt_digests"):
        listed = [each[key] for each in entries if isinstance(each.get(key), list)]
        if digests := {digest for each in listed for digest in each if isinstance(digest, str)}:
            examples[key] = sorted(digests)[:SKETCH]
    return examples


def _require_comparable(a: SteeringVector, b: SteeringVector) -> None:
    """Refuse vectors of different models, which have no common space. Raises ArtifactError."""
    if a.hidden_size != b.hidden_size:
        raise ArtifactError(
            f"the vectors have hidden sizes {a.hidden_size} and {b.hidden_size}", "use vectors of the same model"
        )
    if a.rows != b.rows:
        raise ArtifactError(
            "a stack of rows by layer and another vector can't be compared: whether its first row is the embeddings or "
            "block 0 is not known",
            FIRST_ROW_HINT,
        )
    left, right = a.base.get("digest"), b.base.get("digest")
    if left and right and left != right:
        raise ArtifactError(
            f"the vectors belong to different models: {a.base.get('name', left)} and {b.base.get('name', right)}",
            "extract both from the same model",
        )
