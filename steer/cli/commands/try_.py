"""`steer try`: generate from the same prompts at several strengths, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import Event
from vectors.registry.options import option

if TYPE_CHECKING:
    from vectors.steering import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Request(options.Bindings, options.AnyBase, options.AllowStrength, options.Devices, options.Seeded):
    """The arguments and options of `steer try`."""

    expression: str = option(
        help="A vector, or an expression over vectors.", argument=True, metavar="VECTOR_OR_EXPRESSION",
        complete="vectors",
    )  # fmt: skip
    prompts: tuple[str, ...] = option(help="A prompt; may be given several times.", flag=("-p", "--prompt"))
    strengths: str = option("-2,0,2", help="The factors that multiply the whole expression; one column each.")
    max_tokens: int = option(60, help="The most tokens to generate per completion.", low=1)
    temperature: float = option(0.7, help="The sampling temperature; 0 is greedy decoding.", low=0)
    model: str | None = option(
        None, help=options.MODEL, default_text="the model the vector was made from", complete="models"
    )


@options.command(
    "try",
    summary="Generate from the same prompts at several strengths, side by side.",
    examples="""
    steer try warm.safetensors -p "I lost my keys this morning."
    steer try "1.2*warm - 0.4*formal" --vector formal=formal.safetensors -p "Write to my landlord." --strengths 0,1
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Generate with a vector, or an expression over vectors, at several strengths.

    All strengths run in one batch with the same random numbers, so completions differ by the steering alone. A name in
    an expression is given by --vector, or stands for NAME.safetensors in the current folder.
    """
    request = requests.build(Request, values)
    from vectors import fit
    from vectors.resolve import compose

    errors: list[SteerError] = []
    with collecting(errors):
        strengths = parse_strengths(request.strengths)
    with collecting(errors):
        if any(not prompt.strip() for prompt in request.prompts):
            raise UsageError("a prompt is empty", 'give a text: -p "…"')
    with collecting(errors):
        composition, vectors = compose(request.expression, request.vectors, allow_strength=True)
    raise_together(errors)
    # Raises for an expression that can't be scaled, before a model is loaded.
    scaled = [composition.scaled(strength) for strength in strengths]
    excessive = [] if request.allow_strength else [p for c in scaled for p in fit.problems_of_strength(c, vectors)]
    if excessive:
        raise UsageError(excessive, "use smaller strengths, or allow these: --allow-strength")
    reference = request.model or base_reference(vectors)

    from probes.models.loading import load, open_model
    from probes.strengths import require_fitting, try_strengths

    output.say_preparing(reference)
    ready = open_model(reference)
    require_fitting(ready, vectors, request.prompts, max_tokens=request.max_tokens, any_base=request.any_base)
    with out.progress() as on_event:
        on_event(Event("loading the model"))
        loaded = load(ready, request.device, request.dtype)
        out.say(f"model {loaded.source}, on {loaded.choice}")
        on_event(Event("generating"))
        completions = try_strengths(
            loaded, composition, vectors, request.prompts, strengths, temperature=request.temperature,
            seed=request.seed, max_tokens=request.max_tokens, any_base=request.any_base,
        )  # fmt: skip
    results = [
        {"prompt": prompt, "completions": [{"strength": s, "text": t} for s, t in zip(strengths, row, strict=True)]}
        for prompt, row in zip(request.prompts, completions, strict=True)
    ]
    data = {
        "expression": str(composition),
        "digest": composition.digest,
        "vectors": {name: vector.digest for name, vector in vectors.items()},
        "model": reference,
        "model_path": str(loaded.source.path),
        "seed": request.seed,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "results": results,
    }
    titles = [f"strength {strength:+g}" if strength else "strength 0 (unsteered)" for strength in strengths]

    def human() -> None:
        for prompt, row in zip(request.prompts, completions, strict=True):
            out.line(f"\n> {prompt}\n")
            out.side_by_side(titles, row)

    out.result(data, human)


def parse_strengths(text: str) -> list[float]:
    """The numbers of `--strengths`. Raises UsageError with every malformed one."""
    values, problems = [], []
    for part in text.split(","):
        try:
            value = float(part)
            if not math.isfinite(value):
                raise ValueError
            values.append(value)
        except ValueError:
            problems.append(f"the strength {part.strip()!r} is not a finite number")
    if problems:
        raise UsageError(problems, "write numbers separated by commas: --strengths -2,0,2")
    return values


def base_reference(vectors: dict[str, SteeringVector]) -> str:
    """The model that the vectors record as their base. Raises UsageError when they record none, or several."""
    names = {
        f"{base['name']}@{base['revision']}" if "revision" in base else str(base["name"])
        for base in (vector.base for vector in vectors.values())
        if "name" in base
    }
    if len(names) == 1:
        return names.pop()
    if names:
        raise UsageError(
            f"the vectors belong to different models: {', '.join(sorted(names))}", "choose one: --model MODEL"
        )
    raise UsageError("the vectors do not record the model they belong to", "give it: --model FOLDER")
