"""Folding: a composition becomes weights by algebra, where the architecture allows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.training.requests import CompositionRequest
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.registry.options import option, problems_of

MODE = "fold"
SUMMARY = "exactly, by algebra"
NEEDS = ("composition",)


@dataclass(frozen=True, kw_only=True)
class FoldRequest(CompositionRequest):
    """Exact baking: the composition becomes weights by algebra."""

    via: str = option("auto", help="The route into the weights: auto, bias, llama or layer.", group="Folding")
    skip_vllm: bool = option(
        False, help="Prove the fold in transformers alone, which the report states.", group="Folding"
    )


REQUEST = FoldRequest


def run(request: FoldRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Fold the composition into the weights; returns the report, with the proof. Raises SteerError."""
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
    settings = FoldSettings(
        request.composition, request.model, request.out, vectors=request.vectors, via=request.via,
        prompts=read_prompts(request.prompts)[0] if request.prompts else None, any_base=request.any_base,
        allow_strength=request.allow_strength,
        vllm=False if request.skip_vllm else None, device=request.device, threads=request.threads,
    )  # fmt: skip
    return fold(settings, on_event=on_event)
