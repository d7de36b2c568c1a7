"""What arms need of an engine without a server: the settings that it starts with, and what no engine can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from probes.models.markers import Markers
from steer.evaluation.arms.arm import Arm
from steer.serving.engine import bounds
from steer.serving.settings import MOST_GATES, MOST_STEPS, Settings
from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.probe import Probe, reading_of
from vectors.steering import SteeringVector

# What a server would refuse a client, an evaluation must measure: random directions, and strengths far too great.
SETTINGS = {"any_base": True, "allow_strength": True, "rows": 256, "directions": 16, "phases": 16}


def settings_for(arms: Iterable[Arm], markers: Mapping[str, Sequence[str]] = {}) -> dict[str, Any]:
    """The settings with which an engine applies the compositions of arms and decides their conditions.

    `markers` are the texts that begin and end a kind of section, where they are given (`vectors.language.markers`).
    """
    steered = [(arm.composition, arm.probes) for arm in arms if arm.composition is not None]
    steps = max((len(composition.steps) for composition, _ in steered), default=0)
    given = {kind: list(pair) for kind, pair in markers.items()}
    return {
        **SETTINGS, **gates_for(steered), **({"steps": min(steps, MOST_STEPS)} if steps else {}),
        **({"markers": given} if given else {}),
    }  # fmt: skip


def gates_for(requests: Iterable[tuple[Composition, Mapping[str, Probe | SteeringVector]]]) -> dict[str, Any]:
    """The settings that decide the conditions of compositions, given with what these read."""
    given = [(composition.conditions, sources) for composition, sources in requests]
    most = max((len(conditions) for conditions, _ in given), default=0)
    if not most:
        return {}
    layers = {
        reading_of(sources[each.name], each.layer)[0]
        for conditions, sources in given for each in conditions if not each.is_section
    }  # fmt: skip
    return {"gates": min(most, MOST_GATES), **({"gate_layers": sorted(layers)} if layers else {})}


def require_possible(arms: Iterable[Arm], settings: Mapping[str, Any], markers: Markers) -> None:
    """Refuse arms that vLLM can't run with these settings, and a missing vLLM. Raises UsageError with every problem.

    `markers` are those of the model. It needs no model, and comes before one is loaded.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("--engine vllm needs vLLM, which is not installed", "pip install 'steer-workbench[vllm]'")
    names = Settings.__dataclass_fields__
    limits = Settings(**{name: value for name, value in settings.items() if name in names})
    problems = []
    for arm in arms:
        if arm.composition is None:
            continue
        sources = {**arm.probes, **arm.vectors}
        found = bounds.problems_of_conditions(arm.composition, sources, limits, markers)
        found = found or bounds.problems_of(arm.composition, arm.vectors, limits, torch.float32)
        problems += [f"{arm.name}: {problem}" for problem in found]
    if problems:
        raise UsageError(problems, "vLLM has these limits; --engine transformers has none")
