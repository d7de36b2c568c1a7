"""Lets vLLM's V2 model runner start without a GPU: Triton's interpreter, registered as a backend for the CPU.

Python imports this file at the start of every process that has its folder on PYTHONPATH; it is used by the trial alone.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

with contextlib.suppress(ImportError):
    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends.clear()
    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
