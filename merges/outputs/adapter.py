"""Write a delta as a LoRA adapter in PEFT's format, as the best approximation of each matrix of a given rank."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merges.engine.floats import MERGEABLE
from merges.engine.jobs import run
from merges.engine.pool import Pool
from merges.engine.tensor_task import TensorTask
from merges.inputs.adapters.folder import CONFIG, WEIGHTS
from merges.inputs.decoder import text_settings
from merges.inputs.low_rank import factors
from merges.inputs.sources import Source
from merges.outputs import pairs
from merges.recipes.plan import MEMORY, plan
from merges.recipes.recipe import Recipe
from vectors.errors import ModelError, SteerError, collecting, raise_together
from vectors.events import OnEvent, counter, ignore
from vectors.storage.files import new_file, write_atomically
from vectors.storage.folders import new_folder, require_free_output
from vectors.weights import header_bytes

NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "conv1d", "gate.weight")
Deltas = Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]  # name, shape, and what computes the delta


def from_models(
    base: str, finetuned: str, out: Path, rank: int, *, threads: int | None = None, allow_config: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Write the difference between `finetuned` and `base` as a LoRA adapter in the folder `out`.

    Only the weight matrices of linear layers can be written; `allow_config` names the settings of the configurations
    that may differ. Returns `rank`, `relative_error` (Frobenius norm over all parameters), `modules` (their number) and
    `left_out` (the changed parameters that an adapter can't hold). Raises ModelError, OutputError.
    """
    errors: list[SteerError] = []
    with collecting(errors):
        require_free_output(out)
    with collecting(errors):
        base_model, tuned = pairs.open_pair(base, finetuned, allow_config, on_event=on_event)
    raise_together(errors)
    names = [name for name in sorted(base_model.entries) if base_model.entries[name].dtype in MERGEABLE]

    with Pool(threads) as pool:

        def named() -> Deltas:
            for name in names:
                tensor = pairs.tensor_of(name, base_model, tuned, pool)
                yield name, tensor.shape, functools.partial(pairs.deltas, tensor)

        return _write(
            named(), len(names), base_model, out, rank, counter(on_event, "taking the difference", "parameters")
        )


def from_recipe(
    recipe: Recipe,
    out: Path,
    rank: int,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Write the merged delta of a recipe (with `as: vector`) as a LoRA adapter, one tensor in memory at a time.

    Returns and raises as `from_models` does.
    """
    planned = plan(recipe, memory=memory, threads=threads, device=device, on_event=on_event)
    jobs = [job for job in planned.jobs if isinstance(job, TensorTask)]

    def merged(job: TensorTask) -> np.ndarray:
        return np.concatenate([piece for _, piece in run([job], planned.pool)]).reshape(job.shape)

    with planned.pool:
        named: Deltas = ((job.name, job.shape, functools.partial(merged, job)) for job in jobs)
        return _write(named, len(jobs), planned.base, out, rank, counter(on_event, "merging", "parameters"))


def _write(
    named: Deltas, count: int, base: Source | None, out: Path, rank: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    if base is None:
        raise ModelError("the base model of the adapter is not known", "name it: --base MODEL")
    conv = bool({"GPT2LMHeadModel"} & set(base.config.get("architectures") or []))
    require_free_output(out)
    in_memory = _memory_names(base)
    tensors: dict[str, np.ndarray] = {}
    modules, left_out = [], []
    lost = total = 0.0
    for number, (name, shape, delta_of) in enumerate(named, 1):
        delta = delta_of()
        energy = float(np.square(delta, dtype=np.float64).sum())
        total += energy
        linear = len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in NOT_LINEAR)
        if energy and not linear:
            left_out.append(name)
            lost += energy
        elif energy:
            up, down, error = factors(delta.T if conv else delta, rank)
            lost += energy * error**2
            if up.shape[1] < rank:  # a matrix with fewer rows or columns than the rank
                up = np.pad(up, ((0, 0), (0, rank - up.shape[1])))
                down = np.pad(down, ((0, rank - down.shape[0]), (0, 0)))
            module = in_memory(name).removesuffix(".weight")
            modules.append(module)
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(down)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(up)
        report(number, count)
    if not modules:
        raise ModelError(
            "no weight matrix of a linear layer differs, so there is no adapter to write",
            "use `steer diff` without --to-lora",
        )
    assert base.model is not None
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model.name or base.reference,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": conv,
        "inference_mode": True,
        "target_modules": _targets(modules, [in_memory(name) for name in base.entries]),
    }  # fmt: skip
    _save(out, tensors, config)
    return {
        "rank": rank,
        "relative_error": math.sqrt(lost / total),
        "modules": len(modules),
        "left_out": left_out,
    }


def _memory_names(base: Source) -> Callable[[str], str]:
    """A function from a parameter's name in the base's files to its name in memory, by which PEFT finds it.

    In models of text alone both are the same, but for an outer module; transformers' tables take seconds to load.
    """
    if any(name.startswith("h.") for name in base.entries):
        return lambda name: f"transformer.{name}"
    if text_settings(base.config) is base.config or base.as_base.skeleton is None:
        return lambda name: name
    return base.as_base.skeleton.name


def _targets(modules: list[str], names: list[str]) -> list[str]:
    """PEFT's `target_modules`: the last parts of the names; whole names where another module shares a last part."""
    ends = {module.rpartition(".")[2] for module in modules}
    known = set(modules)
    others = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - known
    shared = {other.rpartition(".")[2] for other in others} & ends
    return sorted(ends) if not shared else sorted(known)


def _save(out: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Write the adapter to a folder that appears complete or not at all. Raises OutputError."""
    ordered = dict(sorted(tensors.items()))
    layout = {name: ("F32", array.shape, array.nbytes) for name, array in ordered.items()}
    with new_folder(out) as folder:
        with new_file(folder / WEIGHTS) as file:
            file.write(header_bytes(layout, {"format": "pt"}))
            for array in ordered.values():
                file.write(array.tobytes())
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
