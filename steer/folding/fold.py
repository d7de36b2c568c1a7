"""Folding: a composition becomes weights by algebra alone, and what was written is proved to be the steered model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from merges.engine.jobs import Copy
from merges.engine.pool import Pool
from merges.inputs.sources import Source, open_source
from probes.data import prompts
from probes.models.loading import load
from steer.folding import ablation, proof, routes
from steer.folding.architectures import Layout, layout
from steer.folding.effects import Effects, effects_of
from steer.folding.model_folder import appearing, size_of, write_draft, write_report
from steer.folding.pending import Draft, draft_of
from vectors import fit, references
from vectors.errors import ArtifactError, ModelError, UsageError
from vectors.resolve import compose
from vectors.steering import SteeringVector

Progress = Callable[[int, int], None]
NOTHING = "the composition changes nothing"
INSTEAD = "train it in: --mode distil; or serve it: steer serve"


def fold(
    composition: str,
    model: str,
    out: str | Path,
    *,
    vectors: Mapping[str, str | Path | SteeringVector] | None = None,
    via: str = "auto",
    asked: Sequence[str] | None = None,
    vllm: bool | None = None,
    any_base: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
    waiting: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Write the model with a composition in its weights at `out`; returns the report, with the proof.

    `via` is a route (bias, llama, layer) or "auto". `asked` are the prompts of the proof. `vllm` None proves in vLLM
    too, where it is installed. Raises UsageError for what can't be folded, ArtifactError for vectors of another model,
    OutputError; ProofError when what was written differs, and then nothing is kept.
    """
    started = time.monotonic()
    parsed, found = compose(composition, vectors)
    effects = effects_of(parsed, found)
    source = open_source(model)
    check_vectors(source, found, any_base)
    with Pool(threads) as pool:
        draft, kinds = plan(draft_of(source, pool), effects, via)
        with appearing(Path(out), size_of(draft)) as folder:
            waiting("writing")
            outputs = write_draft(draft, source, folder, progress)
            written = time.monotonic() - started
            original = load(str(source.path), device, "float32")
            proved = proof.prove(
                folder, original, parsed, found, effects, _layout(source.config, source.entries),
                list(asked) if asked else prompts.held_out(), rounded=_rounded(draft), vllm=vllm, any_base=any_base,
                waiting=waiting,
            )  # fmt: skip
            report = {
                "schema": 1,
                "mode": "fold",
                "composition": str(parsed),
                "vectors": {name: vector.digest for name, vector in found.items()},
                "base": identity_of(source),
                "via": kinds,
                "outputs": outputs,
                "proof": proved,
            }
            write_report(folder, report, source, f"`{parsed}` folded into the weights: {'; '.join(kinds.values())}.")
    return {**report, "seconds": {"writing": written, "all": time.monotonic() - started}}


def plan(draft: Draft, effects: Effects, via: str) -> tuple[Draft, dict[str, str]]:
    """The draft with the effects in it, and in what way each got there, with the reason. Raises UsageError."""
    found = _layout(draft.config, draft.jobs)
    kinds: dict[str, str] = {}
    if not effects.added and not effects.ablates:
        raise UsageError(NOTHING, "give it a strength other than 0")
    if effects.ablates:
        refused = ablation.refusal(effects, found)
        if refused:
            raise UsageError(f"the ablation can't be folded: {refused}", INSTEAD)
        draft = ablation.edit(draft, effects, found)
        kinds["ablation"] = f"every matrix that writes to the stream up to layer {effects.last} is orthogonalised"
    if effects.added:
        known = routes.available()
        tried = known if via == "auto" else {via: routes.find(via)}
        refusals = {name: route.refusal(draft, found) for name, route in tried.items()}
        chosen = next((name for name, refused in refusals.items() if refused is None), None)
        if chosen is None:
            problems = [f"no --via {name}: {refused}" for name, refused in refusals.items()]
            raise UsageError(["the addition can't be folded", *problems], INSTEAD)
        draft = known[chosen].edit(draft, found, effects.added)
        before = list(refusals)[: list(refusals).index(chosen)]
        passed = [f"not {name}, because {refusals[name]}" for name in before]
        why = ", ".join(passed) or ("as asked" if via != "auto" else "the model has the slot")
        kinds["addition"] = f"via {chosen}, {known[chosen].SUMMARY} ({why})"
    return draft, kinds


def check_vectors(source: Source, vectors: Mapping[str, SteeringVector], any_base: bool) -> None:
    """Refuse vectors that do not fit the model, all at once. Raises ArtifactError."""
    base = identity_of(source)
    problems = []
    for name, vector in vectors.items():
        problems += fit.problems(
            name, vector, hidden_size=base["hidden_size"], layers=base["layers"], base=base, any_base=any_base
        )
    if problems:
        raise ArtifactError(problems, "use vectors of this model, or allow others of the same size: --any-base")


def identity_of(source: Source) -> dict[str, Any]:
    """What a report records of its base. Raises ModelError for what is no model folder."""
    if source.kind != "model" or source.model is None or source.adapter is not None:
        raise ModelError(f"{source.reference} is no model of its own", "name a model folder or a hub id")
    return references.identity(source.model)


def _layout(config: Mapping[str, Any], names: Collection[str]) -> Layout:
    found = layout(config, names)
    if found is None:
        raise ModelError(f"it is not known where {config.get('model_type')} writes to its residual stream", INSTEAD)
    return found


def _rounded(draft: Draft) -> bool:
    """Whether matrices were changed in 16 bits."""
    return any(not isinstance(job, Copy) and job.dtype != "F32" for job in draft.jobs.values())
