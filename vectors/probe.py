"""Probe: a linear readout of the activations at one or more layers, as an artifact.

The score of a token whose activation at layer i is h is `h @ layers[i].weight + layers[i].bias`. Weight and bias are
calibrated, so that a score is the log-odds of the positive class where both classes are equally frequent: above 0 the
positive class is the likelier one. Layer i counts as for a steering vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vectors import artifact
from vectors.documents.artifacts import HIGHEST_LAYER, PROBE, RESIDUAL
from vectors.documents.schema import MOST, excerpt, problems_of
from vectors.errors import ArtifactError, shortened
from vectors.registry.layers import spans
from vectors.steering import SteeringVector
from vectors.storage.files import digest_bytes, require_writable, write_atomically
from vectors.weights import Entry

KIND = "probe"
AGAIN = "make it again with `steer probe train`, or copy it again from where it came"
_NAME = re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.(weight|bias)")
_ADDED_BY_ENCODE = ("schema", "checksum", "kind", "hidden_size")


class Readout(NamedTuple):
    """A linear readout of one layer: `weight` [hidden], and `bias`, into which a boundary is folded."""

    weight: Tensor
    bias: float

    def scores(self, states: Tensor) -> Tensor:
        """The score of each activation: states [..., hidden] give [...], in the precision of the weight."""
        return states.to(self.weight.dtype) @ self.weight.to(states.device) + self.bias


@dataclass(frozen=True, eq=False)
class Probe:
    """Readouts by layer (weights float32 [hidden] on the CPU), and metadata as JSON values.

    Raises ArtifactError for no layers, negative ones, and weights that are not finite, one-dimensional and of one size.
    """

    layers: Mapping[int, Readout]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, problems = {}, []
        for i in sorted(self.layers):
            weight, bias = self.layers[i]
            weight = torch.as_tensor(weight).detach().to("cpu", torch.float32, copy=True)
            # Rounded as the file holds it, so that a probe that was read scores as the one that was written.
            layers[int(i)] = Readout(weight, float(torch.tensor(bias, dtype=torch.float32)))
        if not layers:
            problems.append("a probe needs at least one layer")
        for i, (weight, bias) in layers.items():
            if i < 0:
                problems.append(f"layer {i} is negative; layers count from 0")
            if weight.ndim != 1 or weight.numel() == 0:
                problems.append(f"the weight of layer {i} has shape {list(weight.shape)}, not [hidden]")
            elif not bool(torch.isfinite(weight).all() & torch.isfinite(torch.tensor(bias))):
                problems.append(f"layer {i} holds values that are not finite")
        sizes = sorted({weight.numel() for weight, _ in layers.values()})
        if len(sizes) > 1:
            problems.append(f"the layers have different hidden sizes: {', '.join(map(str, sizes))}")
        if problems:
            raise ArtifactError(problems, "check how the probe was made")
        object.__setattr__(self, "layers", layers)

    @property
    def hidden_size(self) -> int:
        """The size of the activations that it reads: the length of each weight."""
        return next(iter(self.layers.values())).weight.numel()

    @property
    def site(self) -> str:
        """Where it reads: `resid_post`, the output of a block, unless the metadata name another site."""
        return str(self.metadata.get("site") or RESIDUAL)

    @property
    def base(self) -> Mapping[str, Any]:
        """The model that it was trained on: `digest`, `architecture`, `name` where known. Empty if unknown."""
        return self.metadata.get("base") or {}

    @property
    def layer(self) -> int:
        """The layer that is read by default: the recommended one, else the only one, else the middle one."""
        recommended: int | None = (self.metadata.get("recommended") or {}).get("layer")
        return recommended if recommended is not None else sorted(self.layers)[len(self.layers) // 2]

    @property
    def threshold(self) -> float:
        """The score above which `layer` counts as positive: what `steer probe gate` chose, else 0."""
        return self.threshold_at(self.layer)

    def threshold_at(self, layer: int) -> float:
        """The threshold of one layer, in scores."""
        return float((self.metadata.get("thresholds") or {}).get(str(layer), 0.0))

    def at(self, layer: int | None = None) -> Readout:
        """The readout of a layer, by default of `layer`. Raises ArtifactError for a layer that it lacks."""
        wanted = self.layer if layer is None else layer
        if wanted not in self.layers:
            raise ArtifactError(f"the probe holds no layer {wanted}", f"it holds {spans(self.layers)}")
        return self.layers[wanted]

    @property
    def digest(self) -> str:
        """`sha256:` of the artifact file that `save` writes."""
        return digest_bytes(self.encode())

    def encode(self) -> bytes:
        """The bytes of the artifact file: a function of the content alone. Raises ArtifactError for odd metadata."""
        problems = [f"{problem} (in its metadata)" for problem in problems_of(self.metadata, PROBE)]
        problems += _problems_of_layers(self.metadata, self.layers)
        if problems:
            raise ArtifactError(problems, "docs/formats.md lists what the metadata of a probe may hold")
        tensors = {f"layer.{i}.weight": readout.weight for i, readout in self.layers.items()}
        tensors |= {f"layer.{i}.bias": torch.tensor([readout.bias]) for i, readout in self.layers.items()}
        return artifact.encode(tensors, dict(self.metadata) | {"kind": KIND, "hidden_size": self.hidden_size})

    def save(self, path: str | Path) -> str:
        """Write the artifact file atomically; return its digest. Raises OutputError."""
        path = Path(path)
        require_writable(path)
        content = self.encode()
        write_atomically(path, content)
        return digest_bytes(content)

    @staticmethod
    def load(path: str | Path) -> Probe:
        """Read a probe file. Raises ArtifactError for a file that is damaged, or of another kind."""
        path = Path(path)
        return _probe(path, artifact.read(path, lambda entries, metadata: _require_probe(path, entries, metadata)))

    @staticmethod
    def decode(content: bytes, path: str | Path = "the probe") -> Probe:
        """Read a probe from the bytes of a file; `path` names it in errors. Raises ArtifactError."""
        path = Path(path)
        read = artifact.decode(content, str(path), lambda entries, metadata: _require_probe(path, entries, metadata))
        return _probe(path, read)

    def __repr__(self) -> str:
        name = self.metadata.get("method", {}).get("name", "unknown method")
        return f"Probe({name}, layers {spans(self.layers)} at {self.site}, hidden size {self.hidden_size})"


def reading_of(source: Probe | SteeringVector, layer: int | None = None) -> tuple[int, Readout]:
    """What a condition of an expression compares with its threshold: the layer that it reads, and the readout there.

    Of a probe, its score, by default at its default layer. Of a vector v, the projection of h in units of strength,
    <h, v> / |v|^2, by default at the recommended layer, else the only one, else the middle one; the readout of a zero
    vector is zero. The state that is read is the block's output after what the composition does there, in float32.
    Raises ArtifactError for a layer that it lacks.
    """
    if isinstance(source, Probe):
        return (source.layer if layer is None else layer), source.at(layer)
    if layer is None:
        recommended = source.metadata.get("recommended")
        known = recommended if isinstance(recommended, Mapping) else {}
        layer = known.get("layer", next(iter(known.get("layers") or ()), None))
        if layer is None or layer not in source.layers:
            layer = list(source.layers)[len(source.layers) // 2]
    elif layer not in source.layers:
        raise ArtifactError(f"the vector holds no layer {layer}", f"it holds {spans(source.layers)}")
    direction = source.layers[layer].double()
    square = float(direction @ direction)
    return layer, Readout((direction / square if square > 0 else direction).float(), 0.0)


def is_probe(path: Path) -> bool:
    """Whether a file is an artifact of this kind, by its header alone; False for what can't be read."""
    from vectors.weights import parse_header

    try:
        with path.open("rb") as file:
            strings = parse_header(file, path.stat().st_size, path, artifact.LARGEST_OF_A_VECTOR)[1]
        metadata = artifact.metadata_of(strings, path)
    except (OSError, ValueError, ArtifactError):
        return False
    return metadata is not None and metadata.get("kind") == KIND


def _require_probe(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any] | None) -> None:
    """Refuse, by the header alone, what is no probe. Raises ArtifactError."""
    if metadata is None:
        raise ArtifactError(f"{path} is no probe: it holds no metadata of steer", "make one with `steer probe train`")
    if (kind := metadata.get("kind")) != KIND:
        raise ArtifactError(
            f"{path} holds a file of the kind {excerpt(kind)}, not a {KIND}", "make one with `steer probe train`"
        )
    problems = []
    if strange := sorted(name for name in entries if not _NAME.fullmatch(name)):
        problems.append(f"{path} holds {shortened([name[:100] for name in strange])}, which are not tensors of a probe")
    layers = {int(match[1]) for name in entries if (match := _NAME.fullmatch(name))}
    if not layers:
        problems.append(f"{path} holds no layer")
    elif max(layers) > HIGHEST_LAYER:
        problems.append(f"{path} has a layer {max(layers)}; no model has more than {HIGHEST_LAYER}")
    for i in sorted(layers)[:MOST]:
        for part in ("weight", "bias"):
            entry = entries.get(f"layer.{i}.{part}")
            if entry is None:
                problems.append(f"{path} holds no layer.{i}.{part}")
            elif entry.dtype != "F32" or len(entry.shape) != 1 or (part == "bias" and entry.elements != 1):
                wanted = "F32 [1]" if part == "bias" else "F32 [hidden]"
                problems.append(f"layer.{i}.{part} of {path} is {entry.dtype} {list(entry.shape)[:8]}, not {wanted}")
    if problems:
        raise ArtifactError(problems[:MOST], AGAIN)


def _probe(path: Path, read: artifact.Artifact) -> Probe:
    assert read.metadata is not None
    numbers = sorted(int(name.split(".")[1]) for name in read.tensors if name.endswith(".weight"))
    metadata = read.metadata
    problems = [f"{problem} (in its metadata)" for problem in problems_of(metadata, PROBE)]
    if not problems:
        problems = _problems_of_layers(metadata, numbers)
        size = read.tensors[f"layer.{numbers[0]}.weight"].numel()
        if metadata.get("hidden_size", size) != size:
            problems.append(f"its metadata has hidden size {metadata['hidden_size']}, its weights {size}")
    if not problems:
        layers = {
            i: Readout(read.tensors[f"layer.{i}.weight"], float(read.tensors[f"layer.{i}.bias"])) for i in numbers
        }
        try:
            return Probe(layers, {key: value for key, value in metadata.items() if key not in _ADDED_BY_ENCODE})
        except ArtifactError as error:
            problems = list(error.problems)
    raise ArtifactError([f"{path}: {problem}" for problem in problems], AGAIN)


def _problems_of_layers(metadata: Mapping[str, Any], layers: Any) -> list[str]:
    """Layers that the metadata name and the probe lacks."""
    layer = (metadata.get("recommended") or {}).get("layer")
    problems = []
    if layer is not None and layer not in layers:
        problems.append(f"it recommends layer {layer}, which it lacks (it has {spans(layers)})")
    missing = [key for key in metadata.get("thresholds") or {} if int(key) not in layers]
    if missing:
        problems.append(f"it has a threshold for layer {shortened(missing)}, which it lacks (it has {spans(layers)})")
    return problems
