"""The header of a GGUF file: its values by key, and where its tensors lie.

The reader of the package `gguf` makes an array for every element of an array, ten seconds for 400 KB of them; this one
skips what a control vector has no use for, and reads no tensor.

Source: ggml-org/ggml `docs/gguf.md`, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
ITEMS = 1_000_000  # keys, tensors, and texts in arrays: a vocabulary has up to 300,000
LONGEST = 16_000_000  # bytes of one text
DIMENSIONS = 4
F32 = 0  # the type of tensors of 32-bit floats

# The formats of plain values by their type; 8 is text, 9 an array.
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """One tensor: its shape (the fastest dimension first), its type, and the offset of its bytes in the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """The content before the data: plain values and texts by key (no arrays), tensors by name, and the byte order."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    order: str  # "<" or ">"
    data: int  # offset of the data in the file


class _Cursor:
    """A position in the content that moves forward, and never beyond its end."""

    def __init__(self, content: np.ndarray, order: str) -> None:
        self.content, self.order, self.at, self.items = content, order, len(MAGIC), 0

    def bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.content):
            raise ValueError("it ends before its content does")
        part = self.content[self.at : end].tobytes()
        self.at = end
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(self.order + form, self.bytes(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > LONGEST:
            raise ValueError("it ends before its content does" if length > len(self.content) else "a text is too long")
        return self.bytes(length).decode()

    def skip(self, count: int) -> None:
        if self.at + count > len(self.content):
            raise ValueError("it ends before its content does")
        self.at += count

    def count(self, number: int) -> None:
        self.items += number
        if self.items > ITEMS:
            raise ValueError(f"it holds more than {ITEMS:,} items, or ends before its content does")

    def value(self) -> Any:
        """One value of a key; None for an array, which is skipped."""
        kind = self.number("I")
        if kind == _ARRAY:
            inner, length = self.number("I"), self.number("Q")
            if inner in _PLAIN:
                self.skip(length * struct.calcsize("<" + _PLAIN[inner]))
            elif inner == _TEXT:
                self.count(length)
                for _ in range(length):
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"it holds an array of the unknown type {inner}")
            return None
        if kind != _TEXT and kind not in _PLAIN:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return self.text() if kind == _TEXT else self.number(_PLAIN[kind])


def header(content: np.ndarray) -> Header:
    """The header of a file's content, bytes as uint8 that may be mapped. Raises ValueError."""
    order = "<"
    cursor = _Cursor(content, order)
    version = cursor.number("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        cursor.order, cursor.at = ">", len(MAGIC)
        version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"it has the version {version}; 2 and 3 are read")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    cursor.count(tensor_count + key_count)
    values: dict[str, Any] = {}
    for _ in range(key_count):
        key, value = cursor.text(), cursor.value()
        if key in values:
            raise ValueError(f"it holds the key {key[:60]!r} twice")
        values[key] = value
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        if name in tensors:
            raise ValueError(f"it holds the tensor {name[:60]!r} twice")
        tensors[name] = Tensor(shape, cursor.number("I"), cursor.number("Q"))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment}")
    return Header(values, tensors, cursor.order, -(-cursor.at // alignment) * alignment)


def floats(content: np.ndarray, header: Header, name: str) -> np.ndarray:
    """The numbers of one tensor of type F32, flat, in the byte order of this machine. Raises ValueError."""
    tensor = header.tensors[name]
    start = header.data + tensor.offset
    end = start + 4 * math.prod(tensor.shape)
    if end > len(content):
        raise ValueError(f"it ends before {name[:60]} does")
    return np.frombuffer(content[start:end].tobytes(), f"{header.order}f4").astype(np.float32)
