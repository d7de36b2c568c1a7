"""Storage of the pooled activations of all examples: in memory if they are small, else in a temporary file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vectors.errors import OutputError

MEMORY = 64 * 2**20  # bytes; larger arrays go to a temporary file


class Spill:
    """An array [layers, examples, hidden] of float32, written in pieces and read a layer at a time.

    Validation on held-out folds reads every example again; on disk they keep memory independent of the number of
    examples. The file has no name, or is unlinked at once, so a killed process leaves nothing behind.
    """

    def __init__(self, layers: int, examples: int, hidden: int, memory: int | None = None) -> None:
        self.shape = (layers, examples, hidden)
        self.memory: Tensor | None = None
        self.file = None
        if 4 * layers * examples * hidden <= (MEMORY if memory is None else memory):
            self.memory = torch.empty(self.shape)
        else:
            try:
                self.file = tempfile.TemporaryFile(prefix="steer-", buffering=0)  # noqa: SIM115  (closed by `close`)
            except OSError as error:
                raise OutputError(
                    f"no temporary file can be made for the activations: {error.strerror}",
                    "free some space, set TMPDIR to another folder, or ask for fewer --layers",
                ) from error

    def write(self, layer: int, indices: Sequence[int], rows: Tensor) -> None:
        """Store rows [len(indices), hidden] of one layer. Raises OutputError when the disk is full."""
        rows = rows.float().cpu()
        if self.memory is not None:
            self.memory[layer, list(indices)] = rows
            return
        assert self.file is not None
        width = 4 * self.shape[2]
        content = rows.contiguous().numpy()
        try:
            for row, index in enumerate(indices):
                written = os.pwrite(self.file.fileno(), content[row].data, (layer * self.shape[1] + index) * width)
                if written != width:
                    raise OSError(28, os.strerror(28))
        except OSError as error:
            needed = 4 * self.shape[0] * self.shape[1] * self.shape[2] / 2**20
            raise OutputError(
                f"the activations ({needed:.0f} MiB) can't be kept in {tempfile.gettempdir()}: {error.strerror}",
                "free some space, set TMPDIR to another folder, or ask for fewer --layers",
            ) from error

    def layer(self, layer: int) -> Layer:
        """The rows of one layer, read on demand."""
        return Layer(self, layer)

    def read(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of one layer, float32 [stop - start, hidden]; all of them by default. Raises OutputError."""
        first, last, _ = slice(start, stop).indices(self.shape[1])
        if self.memory is not None:
            return self.memory[layer, first:last]
        assert self.file is not None
        width = 4 * self.shape[2]
        size = max(0, last - first) * width
        content = bytearray(size)
        view = memoryview(content)
        done = 0
        while done < size:
            count = os.preadv(self.file.fileno(), [view[done:]], (layer * self.shape[1] + first) * width + done)
            if count == 0:
                raise OutputError("the temporary file of the activations was cut short", "run again")
            done += count
        return torch.frombuffer(content, dtype=torch.float32).view(-1, self.shape[2])

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, or delete the file."""
        self.memory = None
        if self.file is not None:
            self.file.close()
            self.file = None


class Layer(NamedTuple):
    """The rows of one layer of a spill, [examples, hidden]; `rows` reads a slice of them."""

    spill: Spill
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Examples and hidden size, as a tensor's."""
        return self.spill.shape[1:]

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, hidden]."""
        return self.spill.read(self.number, start, stop)
