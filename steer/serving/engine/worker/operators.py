"""The plugin's operators for torch.compile, `torch.ops.steer.NAME`: each is defined once, where its module is imported.

A change of a buffer is declared in the schema, `Tensor(a!)`, so that torch.compile keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("steer", "FRAGMENT")


def define(schema: str, *, cuda: Callable[..., Any], cpu: Callable[..., Any] | None, shape: Callable[..., Any]) -> None:
    """Define an operator by its schema: what it is on a GPU and on a CPU; `shape` gives an empty result for tracing."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, cuda, "CUDA")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"steer::{name}", shape, lib=_LIBRARY)


def nothing(*_: Any) -> None:
    """The result of an operator that only changes buffers."""
