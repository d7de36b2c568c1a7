"""The dtype that a processor serves a model in, where vLLM's own choice is slow on it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from merges.inputs.checkpoints import quantiser
from steer.serving.flags import value_of

CPUINFO = Path("/proc/cpuinfo")
SHARE = 0.5  # of the memory, which the weights may take in float32
REASON = "float32: this processor has no AVX-512, without which bfloat16 is slower (-- --dtype auto: vLLM's choice)"


def dtype_flags(model: Path, flags: Sequence[str]) -> list[str]:
    """`--dtype float32` for a vLLM on an x86 processor without AVX-512, else no flag. `model` is a model's folder.

    Without AVX-512 bfloat16 is emulated: on `smollm2`, float32 answered 4 requests at once 2.6 times as fast, and 16
    at once 3.0 to 3.6 times; one alone took the same time. vLLM's choice stays where `flags` give a dtype, where the
    model is quantised (the kernels of its weights have their own), and where float32 would take more than SHARE of
    the memory.
    """
    if value_of(flags, "--dtype", "--dt") is not None or not _lacks_avx512() or _is_quantised(model, flags):
        return []
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return ["--dtype", "float32"] if 0 < 2 * weights <= SHARE * memory() else []


def memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lacks_avx512() -> bool:
    """Whether this is an x86 processor (Linux names its instructions in `flags`, ARM's in `Features`) without it."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    instructions = next((line.split() for line in lines if line.startswith("flags")), ["avx512f"])
    return "avx512f" not in instructions


def _is_quantised(model: Path, flags: Sequence[str]) -> bool:
    """Whether the model's configuration or a flag names a quantisation; True where it can't be read."""
    try:
        configuration = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return True
    return (
        not isinstance(configuration, dict)
        or quantiser(configuration) is not None
        or value_of(flags, "--quantization", "--quantiz") is not None
        or value_of(flags, "-q", "-q") is not None
    )
