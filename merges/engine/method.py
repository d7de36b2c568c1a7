"""The definition of a merge method: one `MergeMethod` called METHOD in a file of `merges/methods`.

Another package offers one by an entry point of the group `steer.merge_methods`, which names either the module that
holds METHOD or the object itself. A minimal method:

    def combine(task: TensorTask, block: Block, prepared: None) -> np.ndarray:
        return block.values.max(0)

    METHOD = MergeMethod(
        name="greatest", summary="the greatest delta of each element", source="folklore",
        space="delta", base="needed", combine=combine,
    )

The computation (`space`, `unit`, `prepare`, `combine`, `elementwise`) is described by `Computation` in tensor_task.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from merges.engine.tensor_task import Computation, TensorTask
from vectors.registry.options import Option

Shape = tuple[int, ...]


class Statistic(NamedTuple):
    """A safetensors file that every input needs beside its weights, such as its diagonal Fisher information."""

    name: str  # the key in the recipe that gives the file
    shape_of: Callable[[Shape], Shape | None]  # from a parameter's shape to that of its statistic; None: no statistic
    required: bool = True  # whether every parameter with a shape must have it


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Computation):
    """A merge method: its computation, and the facts that recipes, checks and help texts use.

    `name` is how recipes and commands call it, `summary` one line of help, `source` the paper or tool it comes from.
    """

    name: str
    summary: str
    source: str
    options: tuple[Option, ...] = ()
    base: Literal["needed", "optional", "unused"]
    inputs: tuple[int, int | None] = (1, None)  # the least and the greatest number of inputs; None: any number
    symmetric: bool = True  # the order of the inputs has no meaning
    global_scope: bool = False  # `scope: global` lets its statistics go over all tensors of the model together
    statistics: tuple[Statistic, ...] = ()
    divides_by_weights: Callable[[Mapping[str, Any]], bool] = lambda options: False  # then their sum must not be zero
    problems_of: Callable[[TensorTask], list[str]] = lambda task: []  # what is wrong with the options, as sentences

    def __post_init__(self) -> None:
        if self.combine is None and self.elementwise is None:
            raise TypeError(f"the merge method {self.name} has neither combine nor elementwise")
