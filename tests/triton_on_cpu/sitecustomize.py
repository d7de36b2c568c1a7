"""Lets vLLM's V2 model runner start without a GPU: Triton's interpreter, registered as a backend for the CPU.

Python imports this file at the start of every process that has its folder on PYTHONPATH: the engines of tests and of
the hostile trial, and the processes that they start. Nothing is compiled: `_Compiler` has only what torch.compile reads
for the key of its cache.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

with contextlib.suppress(ImportError):
    import triton.backends
    from triton.backends.compiler import GPUTarget

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

        @staticmethod
        def get_current_target() -> Any:
            return GPUTarget("cpu", 0, 1)

    class _Compiler:
        def __init__(self, target: Any) -> None:
            self.target = target

        @staticmethod
        def supports_target(target: Any) -> bool:
            return True

        @staticmethod
        def hash() -> str:
            return "interpreter"

    triton.backends.backends.clear()
    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=_Compiler)
