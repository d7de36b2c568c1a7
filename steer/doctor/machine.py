"""The machine: its devices, and the folders that are written to, with the room in each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steer.doctor.problem import Problem

LEAST_FREE = 1 << 30  # bytes free in a file system below which a folder counts as full
LEAST_SHARED = 128 << 20  # bytes of shared memory below which vLLM's processes have failed to start
LEFTOVERS = (".*.steer-tmp", ".*.work", ".*.partial", ".*.bake")  # names of what a killed run leaves


def cpu() -> dict[str, Any]:
    """The cores that this process may use, and the machine's memory in bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cores": cores, "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def devices() -> tuple[dict[str, Any], list[Problem]]:
    """The devices that torch can compute on, by name, with their memory in bytes; and GPUs that it can't use."""
    import torch

    found: dict[str, Any] = {"cpu": cpu()}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = {"name": facts.name, "memory": facts.total_memory}
    if torch.backends.mps.is_available():
        found["mps"] = {"name": "Apple GPU"}
    return found, gpu_problems(len(found) > 1, torch.version.cuda or torch.version.hip, Path("/dev/nvidia0").exists())


def gpu_problems(usable: bool, build: str | None, driver: bool) -> list[Problem]:
    """A GPU that torch can't use. `build` is the version of CUDA or ROCm that torch was built for; None for none."""
    if usable or not driver:
        return []
    if build is None:
        what = "this machine has an NVIDIA GPU, and the installed torch is a build for CPUs"
        return [Problem(what, "install a CUDA build of torch: https://pytorch.org/get-started")]
    what = f"this machine has an NVIDIA GPU, which torch (built for CUDA {build}) can't use"
    return [Problem(what, "see whether nvidia-smi runs, whether its driver is new enough, and CUDA_VISIBLE_DEVICES")]


def folders() -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The folders that are written to, by what is in them, and the problems of writing there.

    Of each: `path`, `exists`, `bytes` (what its files take, None where other programs write there too), `free`, the
    bytes that are left in its file system, and `writable`.
    """
    states = {}
    problems = []
    for name, folder, counted, smaller, elsewhere in _folders():
        free, writable = room(folder)
        bytes_ = size(folder) if counted else None
        states[name] = {
            "path": str(folder), "exists": folder.is_dir(), "bytes": bytes_, "free": free, "writable": writable,
        }  # fmt: skip
        if not writable:
            hint = f"change its permissions or its mount, or {elsewhere}"
            problems.append(Problem(f"{name}: {folder} can't be written to", hint))
        elif free < (LEAST_SHARED if name == SHARED else LEAST_FREE):
            what = f"{name}: {free / 2**20:.0f} MiB are free in the file system of {folder}"
            problems.append(Problem(what, f"{smaller or 'free some of it'}, or {elsewhere}"))
    return states, problems


SHARED = "shared memory"


def _folders() -> Iterator[tuple[str, Path, bool, str, str]]:
    """Of each folder: what is in it, its path, whether files are counted, how to empty it, how to have it elsewhere."""
    from huggingface_hub import constants

    from vectors.storage import bundled

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    hub = Path(constants.HF_HUB_CACHE)
    yield "hub models", hub, True, "remove models: hf cache rm", "set HF_HOME to another folder"
    yield "bundled model", bundled.folder(), True, "", "set XDG_CACHE_HOME to another folder"
    vllm = Path(os.environ.get("VLLM_CACHE_ROOT", cache / "vllm"))
    yield "vLLM's compiled graphs", vllm, True, "remove them (vLLM compiles again)", "set VLLM_CACHE_ROOT"
    if "NUMBA_CACHE_DIR" in os.environ:
        yield "numba's cache", Path(os.environ["NUMBA_CACHE_DIR"]), True, "", "set NUMBA_CACHE_DIR to another folder"
    yield "current folder", Path.cwd(), False, "", "write elsewhere: --out"
    yield "temporary files", Path(tempfile.gettempdir()), False, "", "set TMPDIR to another folder"
    if Path("/dev/shm").is_dir():
        yield SHARED, Path("/dev/shm"), False, "", "give a container more: docker run --shm-size 1g"


def room(folder: Path) -> tuple[int, bool]:
    """The bytes free for a folder, and whether one may write there; of one that is not there, in what is above it."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize, os.access(folder, os.W_OK | os.X_OK)


def size(folder: Path) -> int:
    """The bytes of a folder's files; those behind links are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                state = os.lstat(os.path.join(root, name))
            except OSError:  # removed meanwhile
                continue
            total += state.st_size if not os.path.islink(os.path.join(root, name)) else 0
    return total


def leftovers() -> list[str]:
    """What killed runs have left in the current folder."""
    return sorted(str(path) for pattern in LEFTOVERS for path in Path().glob(pattern))
