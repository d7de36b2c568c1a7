"""How the benchmarks name the machine and print what they measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median


def machine() -> str:
    """The processor, as its maker names it, and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the least and greatest."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
