"""Registries of methods, formats and commands, found by listing a folder and an entry-point group.

A built-in is a module of a folder; an installed package offers one by an entry point. Both have the same attributes and
are treated alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from vectors.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

T = TypeVar("T")


def entry_points(*, group: str) -> EntryPoints:
    """The entry points of a group; importlib.metadata is imported on first use, because it is slow."""
    from importlib import metadata

    return metadata.entry_points(group=group)


@cache
def discover(package: str, group: str) -> dict[str, ModuleType]:
    """Every module of `package` (those without a leading underscore) and of entry-point group `group`, by name.

    Raises UsageError for an entry point whose name is taken, or that can't be loaded.
    """
    modules: dict[str, ModuleType] = {}
    for entry in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda e: e.name):
        if not entry.name.startswith("_"):
            modules[entry.name] = importlib.import_module(f"{package}.{entry.name}")
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        if point.name in modules:
            raise UsageError(
                f"{point.value} offers {point.name!r} in {group}, a name that is taken", "rename one, or uninstall it"
            )
        try:
            modules[point.name] = point.load()
        except Exception as error:  # the code of another package may raise anything
            raise UsageError(
                f"{point.value}, which offers {point.name!r} in {group}, can't be loaded: {error}",
                "update it, or uninstall it",
            ) from error
    return modules


def discover_as(contract: type, what: str, package: str, group: str) -> dict[str, Any]:
    """`discover`, for modules that must have every name of `contract`, a Protocol; `what` is such a module in messages.

    Raises UsageError with all names that are missing.
    """
    modules = discover(package, group)
    functions = [name for name, value in vars(contract).items() if callable(value) and not name.startswith("_")]
    required = [*contract.__annotations__, *functions]
    problems = [
        f"the {what} {name!r} has no {missing}"
        for name, module in modules.items()
        for missing in required
        if not hasattr(module, missing)
    ]
    if problems:
        raise UsageError(problems, "update the package that offers it, or uninstall it")
    return dict(modules)


def choose(what: str, name: str, available: Mapping[str, T]) -> T:
    """The entry of `available` called `name`. Raises UsageError that lists the names and suggests the closest."""
    if name in available:
        return available[name]
    near = suggestion(name, available)
    guess = f"did you mean {near}? " if near else ""
    raise UsageError(f"there is no {what} {name!r}", f"{guess}available: {', '.join(sorted(available))}")


# Names that other tools and papers use for what is meant here.
SYNONYMS = {
    "caa": "diffmean", "actadd": "diffmean", "mean": "diffmean", "meandiff": "diffmean", "difference": "diffmean",
    "dim": "diffmean", "repe": "pca", "repeng": "pca", "lat": "pca", "lda": "whitened", "fisher": "whitened",
    "probe": "logistic", "linear_probe": "logistic", "sft": "train", "dpo": "train", "finetune": "train",
    "distillation": "distil", "orthogonalise": "fold", "abliterate": "fold", "lerp": "linear", "average": "linear",
    "generate": "try", "compare": "try", "train": "bake", "distil": "bake", "distill": "bake", "fold": "bake",
    "soup": "linear", "adam": "adamw", "task_arithmetic_ties": "ties",
}  # fmt: skip


def suggestion(name: str, available: Iterable[str]) -> str:
    """The available name that is probably meant: a synonym of `name`, or the closest in spelling; else empty."""
    import difflib  # imported here, since only errors need it

    known = list(available)
    plain = name.lower().replace("-", "_")
    if SYNONYMS.get(plain) in known:
        return SYNONYMS[plain]
    near = difflib.get_close_matches(plain, known, 1)
    return near[0] if near else ""


def names(package: str, group: str) -> list[str]:
    """The sorted names that `discover` would find, without importing the modules or the package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    inside = [m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")]
    return sorted({*inside, *(point.name for point in entry_points(group=group))})
