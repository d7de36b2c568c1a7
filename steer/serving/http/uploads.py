"""A vector or probe that a client uploads, or names by path.

Its size is checked before it is read, its header before decoding.

Reading files and decoding run in one thread, so that the event loop goes on serving other requests.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect

from steer.serving.engine import background
from steer.serving.engine.admission import Admission
from steer.serving.http import bodies
from vectors.errors import ArtifactError, UsageError
from vectors.formats import native
from vectors.probe import Probe
from vectors.steering import SteeringVector

# Parsing JSON holds the interpreter's lock, in a thread too, so that these limits keep it short.
HEADER = 1 << 18  # most bytes of a file's header: names, shapes and metadata
VALUES = 20_000  # most values in a file's header: 87,000 empty lists took 0.1 s
REQUEST = 1 << 16  # most bytes of a request that names a path, or an arm
WIDEST = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a value, by the dtypes that a vector may have


def largest(admission: Admission) -> int:
    """The largest size in bytes of a vector file for the served model."""
    return HEADER + admission.layers * admission.hidden * max(WIDEST.values())


async def received(admission: Admission, request: Any) -> tuple[str, SteeringVector | Probe]:
    """The name and the vector or probe of a POST: JSON with name and path, or the file itself with ?name=.

    Raises SteerError, bodies.TooLarge, ClientDisconnect.
    """
    if "json" in request.headers.get("content-type", ""):
        parts = await collected(request, REQUEST)
        name, path = _texts(parts, ("name", "path"), 'send {"name": "warm", "path": "warm.safetensors"}')
        require_name(name)
        return name, await background.run(_from_path, admission, path)
    name = request.query_params.get("name")
    if not name:
        raise UsageError("the vector has no name", "POST /steer/vectors?name=warm with the file as the body")
    require_name(name)
    parts = await collected(request, largest(admission), "send a steering vector of the served model")
    return name, await background.run(_from_parts, admission, parts)


async def received_arm(request: Any) -> tuple[str, str]:
    """The name and the expression of a POST of an arm. Raises SteerError, bodies.TooLarge, ClientDisconnect."""
    parts = await collected(request, REQUEST)
    form = 'send {"name": "friendly", "expression": "1.2*warm - 0.4*formal"}'
    name, expression = _texts(parts, ("name", "expression"), form)
    return name, expression


async def collected(request: Any, limit: int, hint: str = bodies.SHORTER) -> list[bytes]:
    """The parts of a body, not yet joined. Raises bodies.TooLarge as soon as they exceed `limit` bytes, or the length
    that is announced does, and ClientDisconnect."""
    bodies.require_announced(request.scope, limit, hint)
    parts = await bodies.read_parts(request.receive, limit, hint)
    if parts is None:
        raise ClientDisconnect
    return parts


def require_name(name: str) -> None:
    """Refuse a name that can't be a path segment of a DELETE route. Raises UsageError."""
    if "/" in name or name in (".", ".."):
        raise UsageError(f"{name!r} can't be part of a path", "use letters, digits, - and _")


def _texts(parts: list[bytes], keys: tuple[str, ...], form: str) -> list[str]:
    """The values of these keys of a JSON object, all of them strings. Raises UsageError with the form as its hint."""
    try:
        value = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {str(error)[:200]}", form) from error
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in keys):
        raise UsageError(f"the body is not {{{', '.join(keys)}}}", form)
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise UsageError(
            f"the body has {', '.join(repr(key[:60]) for key in unknown[:5])}, which means nothing here", form
        )
    return [value[key] for key in keys]


def _from_path(admission: Admission, text: str) -> SteeringVector | Probe:
    path, limit = admission.path(text), largest(admission)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise _too_large(text, limit)
            content = file.read(8 + HEADER)
            require_header(content, size, text, admission.layers, admission.hidden)
            content += file.read(limit + 1 - len(content))
    except OSError as error:
        raise ArtifactError(f"{text} can't be read: {error.strerror}", "check the file") from error
    if len(content) > limit:
        raise _too_large(text, limit)  # it has grown
    return decoded(admission, content, text)


def _too_large(name: str, limit: int) -> ArtifactError:
    return ArtifactError(f"{name} is larger than {limit} bytes", "name a steering vector of the served model")


def _from_parts(admission: Admission, parts: list[bytes]) -> SteeringVector | Probe:
    return decoded(admission, b"".join(parts), "the file")


def decoded(admission: Admission, content: bytes, name: str) -> SteeringVector | Probe:
    """The vector or probe of a file of this model's size. Raises ArtifactError."""
    if require_header(content, len(content), name, admission.layers, admission.hidden):
        return Probe.decode(content, name)
    return native.decode(content, Path(name))


def require_header(start: bytes, size: int, name: str, layers: int, hidden: int) -> bool:
    """Refuse, by its header alone, a file that is not a vector of this size, nor a probe of it. Raises ArtifactError.

    Return whether it is a probe. `start` holds at least the header of the file, which has `size` bytes; `layers` and
    `hidden` are those of the served model. Other problems are reported when the file is decoded.
    """
    hint = "send a steering vector of the served model"
    try:
        length = struct.unpack("<Q", start[:8])[0]
        if length > min(HEADER, size - 8):
            raise ValueError("its header is longer than the file, or longer than that of any vector")
        text = start[8 : 8 + length]
        if sum(text.count(sign) for sign in (b"[", b"{", b",")) > VALUES:
            raise ValueError(f"its header holds more than {VALUES} values")
        # Counted first: a header full of tiny tensors is not worth parsing. A key of the metadata may count as one. A
        # probe has two tensors for each layer.
        if (count := text.count(b'"data_offsets"')) > 2 * layers + 1:
            raise ArtifactError(f"{name} holds {count} tensors; the model has {layers} layers", hint)
        header = json.loads(text)
        tensors = {key: (entry["dtype"], entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    except (struct.error, ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ArtifactError(f"{name} is truncated or no safetensors file: {str(error)[:200]}", hint) from error
    is_probe = any(key.endswith((".weight", ".bias")) for key in tensors)
    if len(tensors) > (2 * layers if is_probe else layers):
        raise ArtifactError(f"{name} holds {len(tensors)} tensors; the model has {layers} layers", hint)
    unexpected = [
        f"{key[:60]!r}, {str(dtype)[:20]} of shape {shape!r}"[:140]
        for key, (dtype, shape) in tensors.items()
        if not (_is_readout if is_probe else _is_direction)(key, dtype, shape, layers, hidden)
    ]
    if unexpected:
        raise ArtifactError(
            f"{name} holds {'; '.join(unexpected[:3])}; a {'probe' if is_probe else 'vector'} of the model has "
            f"layer.0 to layer.{layers - 1}, "
            + (f"each with .weight [{hidden}] and .bias [1], F32" if is_probe else f"floats of shape [{hidden}]"),
            hint,
        )
    return is_probe


def _is_direction(key: str, dtype: Any, shape: Any, layers: int, hidden: int) -> bool:
    return _is_layer(key, layers) and dtype in [*WIDEST] and shape in ([hidden], [1, hidden])


def _is_readout(key: str, dtype: Any, shape: Any, layers: int, hidden: int) -> bool:
    layer, _, part = key.rpartition(".")
    return _is_layer(layer, layers) and dtype == "F32" and {"weight": [hidden], "bias": [1]}.get(part) == shape


def _is_layer(key: str, layers: int) -> bool:
    number = key.removeprefix("layer.")
    return key.startswith("layer.") and number.isascii() and number.isdecimal() and int(number[:9]) < layers
