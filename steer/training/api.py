"""`bake`: a typed request in, a report out; what Python and the command line share."""

from __future__ import annotations

from typing import Any

from steer.training import modes
from steer.training.requests import FoldRequest, Request
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.registry.options import problems_of


def bake(request: Request, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Bake a behaviour into weights, by the mode that the request's type belongs to; returns the report as JSON values.

    With several processes, rank 0 returns the report and the others an empty one. Raises
    UsageError, ExampleError, ArtifactError, ModelError, OutputError before any work; ProofError, TrainingError.
    """
    if isinstance(request, FoldRequest):
        return _fold(request, on_event)
    return modes.run(request, on_event=on_event)


def _fold(request: FoldRequest, on_event: OnEvent) -> dict[str, Any]:
    from probes.data.reading import read_prompts
    from steer.folding.fold import FoldSettings, fold

    problems = problems_of(request)
    if request.composition is None:
        problems.append("there is nothing to bake: no composition")
    if problems:
        raise UsageError(problems, "see steer bake --help")
    if request.as_ != "model":
        raise UsageError(f"a fold adds tensors that no {request.as_} holds", "--as model, or --mode distil")
    assert request.composition is not None
    checked = FoldSettings(
        request.composition, request.model, request.out, vectors=request.vectors, via=request.via,
        prompts=read_prompts(request.prompts)[0] if request.prompts else None, any_base=request.any_base,
        vllm=False if request.skip_vllm else None, device=request.device, threads=request.threads,
    )  # fmt: skip
    return fold(checked, on_event=on_event)
