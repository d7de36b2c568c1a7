"""LoRA on parameters (`target_parameters`): the experts of a layer, which are one tensor in memory.

PEFT puts a wrapper around the module for each parameter, the first innermost, and keeps the factors of all experts in
one pair: A [rank * experts, inputs], and B [outputs, rank * experts] with the experts last.
"""

from __future__ import annotations

from collections.abc import Mapping

from merges.engine.adapted import Slice, Stack
from merges.engine.readers import Dense, LowRank, Reader, read_whole
from merges.inputs.adapters.base import Base
from merges.inputs.adapters.keys import Module
from merges.inputs.adapters.settings import Settings
from merges.inputs.names import Part, Skeleton

_INNER = ".base_layer"


def deltas(modules: Mapping[str, Module], settings: Settings, base: Base) -> tuple[dict[str, Reader], list[str]]:
    """The deltas that LoRA on parameters makes, by tensor of the base; and the problems of the adapter."""
    result: dict[str, Reader] = {}
    problems: list[str] = []
    skeleton = base.skeleton
    if skeleton is None:
        return result, [f"changes {name}, which the base lacks" for name in modules]
    fused = skeleton.fused(base.entries)
    for name, module in modules.items():
        owner = name
        while owner.endswith(_INNER):
            owner = owner.removesuffix(_INNER)
        depth = (len(name) - len(owner)) // len(_INNER)
        parameters = _targets(owner, settings, skeleton)
        if depth >= len(parameters):
            problems.append(f"changes {name}, which the base lacks")
            continue
        parameter = parameters[len(parameters) - 1 - depth]
        try:
            result |= _split(parameter, module, settings, base, skeleton, fused)
        except ValueError as error:
            problems.append(f"changes {parameter}, {error}")
    return result, problems


def _targets(owner: str, settings: Settings, skeleton: Skeleton) -> list[str]:
    """The parameters of a module that the settings name, in the order in which PEFT wraps them."""
    owner = skeleton.name(owner + ".weight").removesuffix(".weight")
    try:
        module = skeleton.model.get_submodule(owner)
    except AttributeError:
        return []
    wanted = settings.values.get("target_parameters") or ()
    parameters = [f"{owner}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return [name for name in parameters if any(name == target or name.endswith(f".{target}") for target in wanted)]


def _split(
    parameter: str, module: Module, settings: Settings, base: Base, skeleton: Skeleton,
    fused: Mapping[str, tuple[list[Part], list[object]]],
) -> dict[str, Reader]:  # fmt: skip
    """The delta of a parameter in memory, for each of the tensors in files that it is made of. Raises ValueError."""
    shape = skeleton.shapes[parameter]
    if set(module.factors) != {"A", "B"} or module.magnitude is not None:
        raise ValueError("of which it does not have two factors")
    up, down = read_whole(Dense(module.factors["B"])), read_whole(Dense(module.factors["A"]))
    count = shape[0] if len(shape) == 3 else 1
    rank, scale = settings.rank(parameter), settings.scale(parameter)
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != rank * count or down.shape[0] != rank * count:
        raise ValueError(f"with factors that do not have the rank {rank} for each of {count}")
    owner = skeleton.model.get_submodule(parameter.rpartition(".")[0])
    transposed = len(shape) == 3 and bool(getattr(owner, "is_transposed", False))
    each: list[Reader] = [
        LowRank(up.reshape(-1, rank, count)[:, :, i], down.reshape(count, rank, -1)[i], scale, transpose=transposed)
        for i in range(count)
    ]
    if any(reader.shape != shape[-2:] for reader in each):
        raise ValueError(f"by a delta of {list(each[0].shape)} for each of {list(shape)}")
    if parameter not in fused:
        name = base.parameter(parameter)
        if name is None or base.entries[name].shape != shape:
            raise ValueError("which the base lacks in this shape")
        return {name: Stack(each) if len(shape) == 3 else each[0]}
    parts, operations = fused[parameter]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise ValueError("which transformers makes from the base's tensors in a way that can't be undone here")
    return _rows_of_each(parts, each, base)


def _rows_of_each(parts: list[Part], each: list[Reader], base: Base) -> dict[str, Reader]:
    """The rows of each expert's delta, for the tensors that lie one below the other in it."""
    result: dict[str, Reader] = {}
    first = [0] * len(each)
    for pattern in sorted({part.pattern for part in parts}):
        names = [part.name for part in parts if part.pattern == pattern]
        if len(names) != len(each):
            raise ValueError(f"for {len(each)} experts, where the base has {len(names)}")
        for i, name in enumerate(names):
            shape = base.entries[name].shape
            result[name] = Slice(each[i], first[i], shape)
            first[i] += shape[0]
    if any(rows != reader.shape[0] for rows, reader in zip(first, each, strict=True)):
        raise ValueError("whose rows are not those of the base's tensors")
    return result
