"""Bake modes: one per file, discovered in this folder; _protocol.py says what a mode must define."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.training.modes._protocol import ModeModule
from steer.training.requests import BakeRequest, require_output_name
from vectors.events import OnEvent, ignore
from vectors.registry.plugins import choose, discover_as

GROUP = "steer.bake_modes"


def available() -> dict[str, list[ModeModule]]:
    """The modes by the value of --mode, each with the modules that share it, the shortest NEEDS first."""
    by_mode: dict[str, list[ModeModule]] = {}
    modules: dict[str, ModeModule] = discover_as(ModeModule, "bake mode", __name__, GROUP)
    for module in sorted(modules.values(), key=lambda module: len(module.NEEDS)):
        by_mode.setdefault(module.MODE, []).append(module)
    return dict(sorted(by_mode.items()))


def request_types() -> tuple[type[BakeRequest], ...]:
    """The request types of all modes."""
    return tuple(module.REQUEST for modules in available().values() for module in modules)


def request_type(mode: str, values: Mapping[str, Any]) -> type[BakeRequest]:
    """The request type of a --mode for the given fields: of the module with the most NEEDS, all of them given.

    Raises UsageError for an unknown mode.
    """
    modules = choose("mode", mode, available())

    def fitting(module: ModeModule) -> tuple[bool, int]:
        given = sum(bool(values.get(name)) for name in module.NEEDS)
        return given == len(module.NEEDS), given

    return max(modules, key=fitting).REQUEST


def run(request: BakeRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Bake by the mode whose request type this is; returns the report. Raises SteerError."""
    for modules in available().values():
        for module in modules:
            if type(request) is module.REQUEST:
                require_output_name(request)
                return module.run(request, on_event=on_event)
    raise TypeError(f"no mode takes a {type(request).__name__}")
