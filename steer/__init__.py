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
    from probes.directions.extraction import Extraction
    from probes.models.loading import LoadedModel
    from probes.models.loading import load as load_model
    from probes.steered import steered
    from probes.strengths import try_strengths
    from steer.extraction import extract
    from steer.folding.fold import fold
    from steer.training.bake import bake
    from vectors.errors import SteerError
    from vectors.expression import Composition, parse
    from vectors.resolve import compose
    from vectors.steering import SteeringVector
    from vectors.task import TaskVector

_HOME = {
    "Composition": "vectors.expression",
    "Extraction": "probes.directions.extraction",
    "LoadedModel": "probes.models.loading",
    "SteerError": "vectors.errors",
    "SteeringVector": "vectors.steering",
    "TaskVector": "vectors.task",
    "bake": "steer.training.bake",
    "compose": "vectors.resolve",
    "extract": "steer.extraction",
    "fold": "steer.folding.fold",
    "load_model": "probes.models.loading",
    "parse": "vectors.expression",
    "steered": "probes.steered",
    "try_strengths": "probes.strengths",
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
