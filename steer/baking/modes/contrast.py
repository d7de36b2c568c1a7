"""The contrastive difference: train both signs, subtract; what both learned of form and topic cancels.

theta+ - theta- (Fierro and Roger 2025, arXiv:2511.05408) is a task vector by itself: a result for `steer merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges import running
from merges.recipe import Part, Recipe
from steer.baking import bake, result
from steer.baking.bake import Request, Tell
from steer.baking.modes import train
from vectors.errors import UsageError


def contrast(request: Request, path: Path, against: Path, *, weight: float = 1.0, tell: Tell) -> dict[str, Any]:
    """Train on `path` and on `against`, and write `weight` times their difference. Returns both reports.

    Raises UsageError for an adapter, which can't hold a difference of two at their rank; and what `bake` raises.
    """
    if request.as_ == "lora":
        raise UsageError("the difference of two adapters is no adapter of their rank", "--as vector, or --as model")
    result.check(request.as_, request.out, 0, request.lora is None)
    reports: dict[str, Any] = {}
    parts = []
    for sign, file in ((1.0, path), (-1.0, against)):
        name = "for" if sign > 0 else "against"
        half = request.out.with_name(f".{request.out.name}.{name}.safetensors")
        if not half.is_file():  # done by a run that was interrupted
            own = replace(request, out=half, as_="vector")
            tell({"stage": f"training on {file.name}"})
            reports[name] = bake.bake(own, train.imitate(own, file), tell=tell)
        parts.append(Part(str(half), name, {"weight": sign * weight}))
    recipe = Recipe("task_arithmetic", tuple(parts), request.model)
    if request.as_ == "vector":
        recipe = replace(recipe, as_="vector")
    record = running.merge(recipe, request.out, threads=request.threads)
    for part in parts:
        for extra in request.out.parent.glob(f"{Path(part.model).stem}*"):
            extra.unlink()
    return {"mode": "contrast", "reports": reports, "outputs": record["outputs"], **_weights(parts)}


def _weights(parts: list[Part]) -> Mapping[str, Any]:
    return {"weights": {part.name: part.options["weight"] for part in parts}}
