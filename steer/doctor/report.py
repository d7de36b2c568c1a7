"""The whole report: what `steer doctor` prints."""

from __future__ import annotations

import platform
import sys
from typing import Any

from steer.doctor import installation, machine, serving
from steer.doctor.problem import Problem
from vectors import references
from vectors.events import Event, OnEvent, ignore
from vectors.references import ModelSource


def examine(model: str | None = None, on_event: OnEvent = ignore) -> tuple[dict[str, Any], list[Problem]]:
    """Everything about this installation as JSON values, with a model's part if one is named, and all problems.

    Raises ModelError where there is no such model.
    """
    from steer import __version__

    packages, problems = installation.packages()
    # First, as a wrong name should not be seen only behind the slow checks.
    source = references.resolve(model) if model is not None and not problems else None
    if not problems:
        on_event(Event("importing the installed packages"))
        problems += installation.unimportable()
    broken = any(problem.fatal for problem in problems)
    extras, more = installation.extras() if packages else ({}, [])
    problems += more
    optional = {name: found for extra in extras.values() for name, found in extra["packages"].items()}
    problems += installation.conflicts(packages | optional)
    devices: dict[str, Any] = {"cpu": machine.cpu()}
    if not broken:
        devices, more = machine.devices()
        problems += more
    on_event(Event("counting the bytes of the caches"))
    folders, more = machine.folders()
    problems += more
    vllm, more = (None, []) if broken else serving.state(devices)
    problems += more
    data: dict[str, Any] = {
        "steer": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "devices": devices,
        "vllm": vllm,
        "folders": folders,
        "environment": serving.variables(),
        "leftovers": machine.leftovers(),
        "model": None,
    }
    if source is not None and not broken:
        on_event(Event("reading the model's headers"))
        data["model"], more = _model(model or "", source, devices, vllm)
        problems += more
    data["can"] = abilities(extras, devices, vllm, broken)
    data["problems"] = [problem._asdict() for problem in problems]
    return data, problems


def abilities(
    extras: dict[str, Any], devices: dict[str, Any], vllm: dict[str, Any] | None, broken: bool
) -> dict[str, str]:
    """Which commands can run here, and what is missing for those that can't."""
    cuda = any(name.startswith("cuda") for name in devices)
    core = "no: see the problems" if broken else "yes"
    serve = core
    if vllm is not None and not broken:
        serve = f"yes, on vLLM's {vllm['runner']} runner" if vllm["supported"] else "no: see the problems"
    elif not broken:
        serve = f"no: {extras['vllm']['install']} on a GPU, else make setup"
    has = {name for name, extra in extras.items() if extra["state"] == "installed"}
    return {
        "extract, try": core,
        "serve": serve,
        "bake by folding": core,
        "bake by training": core if "train" in has or broken else "all weights only; LoRA needs the extra train",
        "diff, merge, apply": core,
        "merge on a GPU": "yes" if cuda else "no: there is no CUDA device",
        "vectors plot": core if "plots" in has or broken else "no: install the extra plots",
    }


def _model(
    reference: str, source: ModelSource, devices: dict[str, Any], vllm: dict[str, Any] | None
) -> tuple[dict[str, Any], list[Problem]]:
    from steer.doctor import support

    identity = references.identity(source)
    # The table lies beside the weights: on a GPU where there is one.
    name = next((name for name in devices if name.startswith("cuda")), "cpu")
    table, problems = serving.table(identity["layers"], identity["hidden_size"], devices[name])
    data = {
        "reference": reference,
        "path": str(source.path),
        "architecture": identity["architecture"],
        "layers": identity["layers"],
        "hidden_size": identity["hidden_size"],
        "table": table,
        "support": support.of(reference, source.path, vllm),
    }
    return data, problems
