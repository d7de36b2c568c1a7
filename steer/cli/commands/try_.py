"""`steer try`: the same prompts at several strengths, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from steer.cli import options, output
from vectors.errors import SteerError, UsageError, kept, raise_together

if TYPE_CHECKING:
    from vectors.steering import SteeringVector


@options.command(
    "try",
    summary="The same prompts at several strengths, side by side.",
    examples="""
    steer try warm.safetensors -p "I lost my keys this morning."
    steer try "1.2*warm - 0.4*formal" --vector formal=formal.safetensors -p "Write to my landlord." --strengths 0,1
    """,
)
@click.argument("expression", metavar="VECTOR_OR_EXPRESSION")
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="A prompt; may be given several times.")
@click.option("--strengths", default="-2,0,2", help="What the whole expression is multiplied with, one column each.")
@click.option("--max-tokens", default=60, type=click.IntRange(1), help="Tokens of each completion.")
@click.option("--temperature", default=0.7, type=click.FloatRange(0), help="0 takes the likeliest token each time.")
@click.option("--model", help="A folder, a hub id, or smollm2.  [default: the model the vector was made from]")
@options.bindings
@options.any_base
@options.devices
@options.seed
@options.as_json
def command(
    expression: str,
    prompts: tuple[str, ...],
    strengths: str,
    max_tokens: int,
    temperature: float,
    model: str | None,
    vectors: dict[str, Path],
    any_base: bool,
    device: str,
    dtype: str,
    seed: int,
    as_json: bool,
) -> None:
    """Generate with a vector, or an expression over vectors, at several strengths.

    All strengths run in one batch with the same random numbers, so what differs is the steering. Names in an expression
    are those of --vector, or files NAME.safetensors in the current folder.
    """
    from vectors.resolve import compose

    errors: list[SteerError] = []
    with kept(errors):
        values = parse_strengths(strengths)
    with kept(errors):
        if any(not prompt.strip() for prompt in prompts):
            raise UsageError("a prompt is empty", 'give a text: -p "…"')
    with kept(errors):
        composition, found = compose(expression, vectors)
    raise_together(errors)
    for value in values:
        composition.scaled(value)  # refuses what can't be scaled, before a model is loaded
    reference = model or base_reference(found)

    from probes.models.loading import find, load
    from probes.strengths import require_fitting, try_strengths

    output.say_preparing(reference)
    ready = find(reference)
    require_fitting(ready, found, prompts, max_tokens=max_tokens, any_base=any_base)
    loaded = load(ready, device, dtype)
    output.say(f"model {loaded.source}, on {loaded.choice}")
    completions = try_strengths(
        loaded,
        composition,
        found,
        prompts,
        values,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        any_base=any_base,
    )
    if as_json:
        results = [
            {"prompt": prompt, "completions": [{"strength": s, "text": t} for s, t in zip(values, row, strict=True)]}
            for prompt, row in zip(prompts, completions, strict=True)
        ]
        output.print_json(
            {
                "expression": str(composition),
                "digest": composition.digest,
                "vectors": {name: vector.digest for name, vector in found.items()},
                "model": reference,
                "model_path": str(loaded.source.path),
                "seed": seed,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "results": results,
            }
        )
        return
    titles = [f"strength {value:+g}" if value else "strength 0 (unsteered)" for value in values]
    for prompt, row in zip(prompts, completions, strict=True):
        click.echo(f"\n> {prompt}\n\n{output.side_by_side(titles, row)}")


def parse_strengths(text: str) -> list[float]:
    """The numbers of `--strengths`. Raises UsageError with every bad one."""
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
        raise UsageError(problems, "write numbers with commas: --strengths -2,0,2")
    return values


def base_reference(vectors: dict[str, SteeringVector]) -> str:
    """The model that the vectors were made from, if they say so and agree. Raises UsageError."""
    names = {
        f"{base['name']}@{base['revision']}" if "revision" in base else str(base["name"])
        for base in (vector.base for vector in vectors.values())
        if "name" in base
    }
    if len(names) == 1:
        return names.pop()
    if names:
        raise UsageError(
            f"the vectors belong to different models: {', '.join(sorted(names))}", "name one: --model MODEL"
        )
    raise UsageError("the vectors do not say which model they belong to", "name it: --model FOLDER")
