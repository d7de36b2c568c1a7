"""Pooled activations of all examples: in memory while they are few, in a temporary file when they are many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from vectors.errors import OutputError

MEMORY = 64 * 2**20  # bytes kept in memory


class Spill:
    """An array [layers, examples, hidden] of float32, written in pieces and read a layer at a time.

    Held-out judgement needs every example again once the directions are known; on disk they cost no memory, so memory
    does not grow with the number of examples. The file has no name (or loses it at once), so a kill leaves nothing.
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

    def read(self, layer: int) -> Tensor:
        """The rows of one layer, float32 [examples, hidden]."""
        if self.memory is not None:
            return self.memory[layer]
        assert self.file is not None
        size = 4 * self.shape[1] * self.shape[2]
        content = bytearray(size)
        view = memoryview(content)
        start = 0
        while start < size:
            count = os.preadv(self.file.fileno(), [view[start:]], layer * size + start)
            if count == 0:
                raise OutputError("the temporary file of the activations was cut short", "run again")
            start += count
        return torch.frombuffer(content, dtype=torch.float32).view(self.shape[1:])

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and disk back."""
        self.memory = None
        if self.file is not None:
            self.file.close()
            self.file = None
