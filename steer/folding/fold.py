"""Folding: a composition becomes weights by algebra alone, and what was written is proved to be the steered model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merges.engine.jobs import Copy
from merges.engine.pool import Pool
from merges.inputs.sources import Source, open_source
from probes.data import overlap, prompts
from probes.models.loading import load
from steer.folding import ablation, injections, proof
from steer.folding.architectures import checkpoint
from steer.folding.effects import Effects, effects_of
from steer.folding.injections import Injection
from steer.folding.model_folder import size_of, write_model, write_report
from steer.folding.pending import PendingModel, pending_from
from steer.reports import page
from vectors import fit, references
from vectors.architectures import Checkpoint
from vectors.errors import ModelError, UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.resolve import compose
from vectors.steering import SteeringVector
from vectors.storage.folders import new_folder

NOTHING = "the composition changes nothing"
INSTEAD = "train it in: --mode distil; or serve it: steer serve"


@dataclass(frozen=True)
class FoldSettings:
    """The settings of a fold.

    `composition` is an expression over `vectors` (by name; a name that is missing there is looked up in the current
    folder); `via` an injection (bias, llama, layer) or "auto". `prompts` are those of the proof, by default built-in
    ones that no bake trains on. `vllm`: verify in vLLM too; None does so if vLLM is installed.
    """

    composition: str
    model: str
    out: Path
    vectors: Mapping[str, str | Path | SteeringVector] | None = None
    via: str = "auto"
    prompts: Sequence[str] | None = None
    vllm: bool | None = None
    any_base: bool = False
    allow_strength: bool = False
    device: str = "auto"
    threads: int | None = None


def fold(settings: FoldSettings, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write the model with a composition in its weights at `settings.out`; returns the report, with the proof.

    Raises UsageError for what can't be folded, ArtifactError for vectors of another model, OutputError; ProofError when
    the written model differs from the steered one, in which case the output is removed.
    """
    started = time.monotonic()
    composition, vectors = compose(settings.composition, settings.vectors, allow_strength=settings.allow_strength)
    effects = effects_of(composition, vectors)
    source = open_source(settings.model)
    require_fitting_vectors(source, vectors, settings.any_base)
    with Pool(settings.threads) as pool:
        pending, explained = plan(pending_from(source, pool), effects, settings.via)
        with new_folder(settings.out, size_of(pending)) as folder:
            outputs = write_model(pending, source, folder, on_event=on_event)
            written = time.monotonic() - started
            on_event(Event("loading the model"))
            base = load(str(source.path), settings.device, "float32")
            evaluated = (list(settings.prompts) if settings.prompts else prompts.held_out())[: proof.PROMPTS]
            proved = proof.prove(
                folder,
                proof.SteeredModel(base, composition, vectors, settings.any_base),
                effects,
                _checkpoint(source.config, source.entries),
                evaluated,
                rounded=_rounded(pending),
                vllm=settings.vllm,
                on_event=on_event,
            )
            proved["extraction_prompts"] = _of_the_extraction(evaluated, vectors)
            answered = proved.pop("answers")
            report = {
                "schema": 1,
                "mode": "fold",
                "composition": str(composition),
                "vectors": {name: vector.digest for name, vector in vectors.items()},
                "base": identity_of(source),
                "via": explained,
                "outputs": outputs,
                "proof": proved,
                "examples": page.examples_of(evaluated[: proof.ANSWERED], answered),
            }
            summary = f"`{composition}` folded into the weights: {'; '.join(explained.values())}."
            write_report(folder, report, source, summary)
    return {**report, "seconds": {"writing": written, "all": time.monotonic() - started}}


def plan(pending: PendingModel, effects: Effects, via: str) -> tuple[PendingModel, dict[str, str]]:
    """The model with the effects in its weights, and how each was put there and why. Raises UsageError, ModelError."""
    described = _checkpoint(pending.config, pending.jobs)
    explained: dict[str, str] = {}
    if not effects.added and not effects.ablates:
        raise UsageError(NOTHING, "give it a strength other than 0")
    if effects.ablates:
        refusal = ablation.refusal(effects, described)
        if refusal:
            raise UsageError(f"the ablation can't be folded: {refusal}", INSTEAD)
        pending = ablation.edit(pending, effects, described)
        explained["ablation"] = f"every matrix that writes to the stream up to layer {effects.last} is orthogonalised"
    if effects.added:
        name, injection, why = _choose_injection(pending, described, via)
        pending = injection.edit(pending, described, effects.added)
        explained["addition"] = f"via {name}, {injection.SUMMARY} ({why})"
    return pending, explained


def _choose_injection(pending: PendingModel, described: Checkpoint, via: str) -> tuple[str, Injection, str]:
    """The first injection that the model can take, with its name and why it was chosen. Raises UsageError."""
    candidates = injections.available() if via == "auto" else {via: injections.find(via)}
    refusals: dict[str, str] = {}
    for name, injection in candidates.items():
        refusal = injection.refusal(pending, described)
        if refusal is None:
            passed = ", ".join(f"not {other}, because {reason}" for other, reason in refusals.items())
            return name, injection, passed or ("chosen by --via" if via != "auto" else "the model has the slot")
        refusals[name] = refusal
    problems = [f"no --via {name}: {reason}" for name, reason in refusals.items()]
    raise UsageError(["the addition can't be folded", *problems], INSTEAD)


def _of_the_extraction(evaluated: Sequence[str], vectors: Mapping[str, SteeringVector]) -> int:
    """The number of prompts of a proof that a vector was extracted from, which is warned of."""
    seen = {
        prompt
        for vector in vectors.values()
        for prompt in overlap.recorded_prompts(vector.metadata.get("data"), evaluated)
    }
    if seen:
        warnings.warn(
            f"{len(seen)} of the {len(evaluated)} prompts of the proof are prompts of the examples that made the "
            "vector: on these it is not held out of the extraction",
            stacklevel=3,
        )
    return len(seen)


def require_fitting_vectors(source: Source, vectors: Mapping[str, SteeringVector], any_base: bool) -> None:
    """Refuse vectors that do not fit the model, all at once. Raises ArtifactError."""
    base = identity_of(source)
    assert source.model is not None  # which has an identity
    fit.require_fit(
        vectors.items(), hidden_size=base["hidden_size"], layers=base["layers"],
        base=references.identified(source.model, base), any_base=any_base,
    )  # fmt: skip


def identity_of(source: Source) -> dict[str, Any]:
    """The base as reports record it. Raises ModelError for what is not a model folder."""
    if source.kind != "model" or source.model is None or source.adapter is not None:
        raise ModelError(f"{source.reference} is no model of its own", "name a model folder or a hub id")
    return references.identity(source.model)


def _checkpoint(config: Mapping[str, Any], names: Collection[str]) -> Checkpoint:
    described = checkpoint(config, names)
    if isinstance(described, str):
        raise ModelError(described, INSTEAD)
    return described


def _rounded(pending: PendingModel) -> bool:
    """Whether changed matrices are stored in 16 bits."""
    return any(not isinstance(job, Copy) and job.dtype != "F32" for job in pending.jobs.values())
