"""Lets vLLM's V2 model runner start without a GPU: Triton's interpreter, registered as a backend for the CPU.

Python imports this file at the start of every process that has its folder on PYTHONPATH: the engines of tests and of
the hostile trial, and the processes that they start. Nothing is compiled: `_Compiler` has only what torch.compile reads
for the key of its cache. The interpreter exchanges the functions of `triton.language` before every kernel and every
function that a kernel calls, and puts them back behind the kernel: here they stay, since all kernels are interpreted.
"""

from __future__ import annotations

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

with contextlib.suppress(ImportError):
    import triton.backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import interpreter

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

    _exchange = interpreter._patch_lang
    _exchanged: set[int] = set()

    def _exchange_once(kernel: Any) -> Any:
        modules = {id(value) for value in kernel.__globals__.values() if isinstance(value, ModuleType)}
        modules &= {id(interpreter.tl), id(interpreter.tl.core)}
        if not modules <= _exchanged:
            _exchange(kernel)
            _exchanged.update(modules)
        return interpreter._LangPatchScope()  # which has nothing to put back

    interpreter._patch_lang = _exchange_once
