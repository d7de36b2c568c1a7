"""`steer probe state`: how far recurrent states moved along a behaviour's direction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import SteerError, collecting
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example
    from probes.internals.recurrent import Movement


@dataclass(frozen=True, kw_only=True)
class Request(options.AnyBase, options.Devices, options.Seeded):
    """The arguments and options of `steer probe state`."""

    before: str = option(help="The model before training.", argument=True, complete="models")
    after: str = option(help="The model after training.", argument=True, complete="models")
    vector: Path = option(help="The vector of the behaviour, of the model before training.", complete="vectors")
    strength: float | None = option(None, help="The strength.", default_text="the vector's recommended one, or 1")
    prompts: tuple[str, ...] = option(
        (), help="A prompt; may be given several times.", flag=("-p", "--prompt"), default_text="100 everyday prompts"
    )
    prompt_file: Path | None = option(None, help="A file of prompts, one per line.", flag="--prompts")


@options.command(
    "state",
    summary="Measure how far recurrent states moved along a behaviour.",
    examples="""
    steer probe state ./lfm2 ./lfm2-warm --vector warm.safetensors
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Measure how far training moved the recurrent states after a context along a behaviour's direction.

    For Gated DeltaNet (Qwen3-Next, Qwen3.5) and LFM2's convolutions. The direction in a state is how steering by the
    vector changes it; 1 is as far as the vector moves it. The floor is the greatest of eight vectors whose coordinates
    are shuffled and change their sign at random. Fewer than 30 contexts give figures and no verdict.
    """
    errors: list[SteerError] = []
    request = requests.build(Request, values, errors)
    from steer.evaluation.probing.inputs import contexts_of
    from steer.evaluation.probing.internals import state

    contexts: list[Example] = []
    with collecting(errors):
        contexts = contexts_of(request.prompts, request.prompt_file)
    with out.progress() as on_event:
        found, strength = state(
            request.before, request.after, request.vector, contexts, strength=request.strength, seed=request.seed,
            any_base=request.any_base, device=request.device, dtype=request.dtype, errors=errors, on_event=on_event,
        )  # fmt: skip
    data = {
        "before": request.before, "after": request.after, "vector": str(request.vector), "strength": strength,
        "contexts": len(contexts),
        "states": [each._asdict() for each in found],
    }  # fmt: skip
    out.result(data, lambda: _print(found, strength, len(contexts)))


def _print(found: list[Movement], strength: float, contexts: int) -> None:
    from probes.statistics.verdict import too_few_to_say
    from steer.reports import page

    out.line(
        f"movement along the vector (1 is what strength {strength:g} does), on {contexts} "
        f"context{'s'[: contexts != 1]}:"
    )
    out.table(
        ["", "layer", "state", "movement", "95 % interval", "floor", "cosine", "whole movement"],
        [
            [
                "*" if each.beyond_floor else "", str(each.layer), each.kind, f"{each.movement:+.3f}",
                page.interval(each.low, each.high, "+.3f"), f"{each.floor:.3f}", f"{each.cosine:+.3f}",
                f"{each.size:.1%}",
            ]
            for each in found
        ],
    )  # fmt: skip
    too_few = too_few_to_say(contexts, contexts, "context")
    out.line(
        f"\nNo movement is marked: {too_few}."
        if too_few
        else "\n*: the movement lies beyond the floor (p below 0.05, corrected for the number of states)."
    )
    out.line("The whole movement is relative to the state's norm.")
