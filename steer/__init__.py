"""The workbench for the behaviour of language models.

    import steer

    found = steer.extract(pos="warm.jsonl", neg="cold.jsonl")
    found.vector.save("warm.safetensors")
    loaded = steer.load_model("smollm2")
    with steer.steered(loaded.model, "1.5*warm"):
        ...

Everything is imported on first use, so that `import steer` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.extraction import Extraction
    from probes.generate import try_strengths
    from probes.model import LoadedModel
    from probes.model import load as load_model
    from probes.steered import steered
    from steer.baking.bake import bake
    from steer.baking.fold import fold
    from steer.extraction import extract
    from vectors.errors import SteerError
    from vectors.expression import Composition, parse
    from vectors.resolve import compose
    from vectors.steering import SteeringVector
    from vectors.task import TaskVector

_HOME = {
    "Composition": "vectors.expression",
    "Extraction": "probes.extraction",
    "LoadedModel": "probes.model",
    "SteerError": "vectors.errors",
    "SteeringVector": "vectors.steering",
    "TaskVector": "vectors.task",
    "bake": "steer.baking.bake",
    "compose": "vectors.resolve",
    "extract": "steer.extraction",
    "fold": "steer.baking.fold",
    "load_model": "probes.model",
    "parse": "vectors.expression",
    "steered": "probes.steered",
    "try_strengths": "probes.generate",
}

__all__ = [
    "Composition",
    "Extraction",
    "LoadedModel",
    "SteerError",
    "SteeringVector",
    "TaskVector",
    "bake",
    "compose",
    "extract",
    "fold",
    "load_model",
    "parse",
    "steered",
    "try_strengths",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    found = getattr(module, "load" if name == "load_model" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
