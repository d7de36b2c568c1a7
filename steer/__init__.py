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

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectors.registry.places import PLACES

# The public names, for type checkers; from these lines `__getattr__` knows where each name is at home.
if TYPE_CHECKING:
    from merges.api import apply as apply
    from merges.api import diff as diff
    from merges.api import merge as merge
    from merges.recipes.recipe import Part as Part
    from merges.recipes.recipe import Recipe as Recipe
    from probes.directions.extraction import Extraction as Extraction
    from probes.models.loading import LoadedModel as LoadedModel
    from probes.models.loading import load as load_model  # noqa: F401
    from probes.steered import steered as steered
    from probes.strengths import try_strengths as try_strengths
    from steer.evaluation.api import evaluate as evaluate
    from steer.evaluation.probing.apply import activations as activations
    from steer.evaluation.probing.apply import project as project
    from steer.evaluation.probing.train import train as train_probe  # noqa: F401
    from steer.evaluation.sweeping.api import sweep as sweep
    from steer.extraction import extract as extract
    from steer.folding.fold import fold as fold
    from steer.generation import generate as generate
    from steer.reports.plots import layer_separation as plot  # noqa: F401
    from steer.training.api import bake as bake
    from vectors.errors import SteerError as SteerError
    from vectors.expression import Composition as Composition
    from vectors.expression import parse as parse
    from vectors.probe import Probe as Probe
    from vectors.resolve import compose as compose
    from vectors.steering import SteeringVector as SteeringVector
    from vectors.task import TaskVector as TaskVector

__version__ = "0.1.0"


@cache
def _homes() -> dict[str, tuple[str, str]]:
    """Where each public name comes from: a module, and the name it has there."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    lines = next(node.body for node in tree.body if isinstance(node, ast.If))
    imports = (line for line in lines if isinstance(line, ast.ImportFrom) and line.module)
    return {alias.asname or alias.name: (str(line.module), alias.name) for line in imports for alias in line.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("__") or name not in _homes():
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    module, original = _homes()[name]
    value = getattr(importlib.import_module(module), original)
    globals()[name] = value
    return value


def _versions() -> Any:
    """The resolver of the store's versions, so that expressions can name them."""
    from steer.store.using.resolver import resolver

    return resolver()


PLACES.append(_versions)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})
