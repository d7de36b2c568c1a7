"""`steer try`: generate from the same prompts at several strengths and under system prompts, side by side."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import Event
from vectors.language.markers import OPTION as MARKERS
from vectors.language.markers import markers_in
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.gates import Decided
    from probes.strengths import Answer, Column
    from vectors.expression import Composition
    from vectors.steering import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Request(options.Bindings, options.AnyBase, options.AllowStrength, options.Devices, options.Seeded, options.Force):
    """The arguments and options of `steer try`."""

    expression: str | None = option(
        None, help="A vector, or an expression over vectors; without one the plain model answers.", argument=True,
        metavar="[VECTOR_OR_EXPRESSION]", complete="vectors",
    )  # fmt: skip
    prompts: tuple[str, ...] = option(
        (), help="A prompt; may be given several times; - reads one from the input.", flag=("-p", "--prompt")
    )
    prompt_file: Path | None = option(None, help="A file of prompts, one per line.", flag="--prompts")
    strengths: str | None = option(
        None, help="The factors that multiply the whole expression; one column each.",
        default_text="0, half and the whole of the recommended strength; of an expression 0,0.5,1",
    )  # fmt: skip
    system: tuple[str, ...] = option(
        (), help="A system prompt, under which the unsteered model answers in a column of its own; may be given "
        "several times.", metavar="TEXT",
    )  # fmt: skip
    max_tokens: int = option(60, help="The most tokens to generate per completion.", low=1)
    temperature: float = option(0.7, help="The sampling temperature; 0 is greedy decoding.", low=0)
    model: str | None = option(
        None, help=options.MODEL, default_text="the model the vector was made from", complete="models"
    )
    steer_markers: tuple[str, ...] = option((), **MARKERS)
    out: Path | None = option(None, help="A file to write what --json prints to.", flag=("-o", "--out"))


@options.command(
    "try",
    summary="Generate from the same prompts at several strengths, side by side.",
    examples="""
    steer try warm.safetensors -p "I lost my keys this morning."
    steer try "1.2*warm - 0.4*formal" --vector formal=formal.safetensors -p "Write to my landlord." --strengths 0,1
    steer try "2*calm@when:anger>0.5" -p "Where is my parcel?!"
    steer try warm --prompts prompts.jsonl --system "You are a warm person." -o tried.json
    steer try "1.2*warm + 'tone@champion'" -p "How was your day?"
    steer try --model ./folder -p "How was your day?"
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Generate with a vector, or an expression over vectors, at several strengths and under system prompts.

    All columns of a prompt use the same random numbers, so completions differ by the steering alone. A name in an
    expression is given by --vector, or is a version of the store ('tone@champion', in quotes), or stands for
    NAME.safetensors in the current folder. Beside each text stand its tokens, why it ended, the share of repeated
    4-grams, its perplexity under the unsteered model, and what the conditions of the expression read and decided.
    """
    request = requests.build(Request, values)
    from vectors import fit
    from vectors.resolve import compose_gated

    expression, model = request.expression, request.model
    if expression is not None and model is None and _is_model(expression):
        expression, model = None, expression
    errors: list[SteerError] = []
    strengths: list[float] | None = None
    composition, vectors, probes = None, dict[str, Any](), dict[str, Any]()
    if request.strengths is not None:
        with collecting(errors):
            strengths = parse_strengths(request.strengths)
            if expression is None and any(strengths):
                raise UsageError("--strengths scale a vector, and none is given", "steer try VECTOR -p TEXT")
    given = dict[str, list[str]]()
    with collecting(errors):
        given = markers_in(request.steer_markers)
    with collecting(errors):
        prompts = read_all_prompts(request.prompts, request.prompt_file)
    if request.out is not None:
        with collecting(errors):
            output.require_absent(request.out, request.force)
            require_writable_output(request.out)
    if expression is not None:
        with collecting(errors):
            composition, vectors, probes = compose_gated(expression, request.vectors, allow_strength=True)
    raise_together(errors)
    if strengths is None:
        strengths = default_strengths(composition, vectors)

    from probes.strengths import Column, require_fitting, try_columns

    # Raises for an expression that can't be scaled, before a model is loaded.
    scaled = [composition.scaled(strength) for strength in strengths] if composition is not None else []
    excessive = [] if request.allow_strength else [p for c in scaled for p in fit.problems_of_strength(c, vectors)]
    if excessive:
        raise UsageError(excessive, "use smaller strengths, or allow these: --allow-strength")
    columns = [*(Column(strength) for strength in strengths), *(Column(0.0, text) for text in request.system)]
    reference = model or (base_reference(vectors) if composition is not None else "smollm2")

    from probes.models.loading import load, open_model

    output.say_preparing(reference)
    ready = open_model(reference)
    require_fitting(
        ready, vectors, probes, prompts, columns, conditions=composition.conditions if composition is not None else (),
        markers=given, max_tokens=request.max_tokens, any_base=request.any_base,
    )  # fmt: skip
    with out.progress() as on_event:
        on_event(Event("loading the model"))
        loaded = load(ready, request.device, request.dtype, given)
        out.say(f"model {loaded.source}, on {loaded.choice}")
        answers = try_columns(
            loaded, composition, vectors, prompts, columns, probes=probes, temperature=request.temperature,
            seed=request.seed, max_tokens=request.max_tokens, any_base=request.any_base, on_event=on_event,
        )  # fmt: skip
    data = {
        "expression": None if composition is None else str(composition),
        "digest": None if composition is None else composition.digest,
        "vectors": {name: vector.digest for name, vector in vectors.items()},
        "probes": {name: probe.digest for name, probe in probes.items()},
        "model": reference,
        "model_path": str(loaded.source.path),
        "seed": request.seed,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "results": [
            {"prompt": prompt, "completions": [_value(*pair) for pair in zip(columns, row, strict=True)]}
            for prompt, row in zip(prompts, answers, strict=True)
        ],
    }
    if request.out is not None:
        from vectors.storage.files import canonical_json, finite, write_atomically

        write_atomically(request.out, (canonical_json(finite(data)) + "\n").encode())
        out.say(f"wrote {request.out}")

    def human() -> None:
        for prompt, row in zip(prompts, answers, strict=True):
            out.line(f"\n> {prompt}\n")
            out.side_by_side([_title(column) for column in columns], [f"{a.text} {_figures(a)}" for a in row])

    out.result(data, human)


def _is_model(text: str) -> bool:
    """Whether an argument is a model folder and no vector."""
    return os.path.isfile(os.path.join(text, "config.json")) and not os.path.isfile(f"{text}.safetensors")


def _value(column: Column, answer: Answer) -> dict[str, Any]:
    """A completion as JSON values."""
    decisions = [each._asdict() for each in answer.decisions]
    return {"strength": column.strength, "system": column.system, **answer._asdict(), "decisions": decisions}


def _title(column: Column) -> str:
    if column.system is not None:
        return f"system: {column.system}"
    return f"strength {column.strength:+g}" if column.strength else "strength 0 (unsteered)"


def _figures(answer: Answer) -> str:
    """What is measured of a text, in a few words."""
    end = "ended" if answer.finish == "stop" else "cut"
    perplexity = "" if math.isnan(answer.perplexity) else f", perplexity {answer.perplexity:.3g}"
    decided = "".join(f" [{_decided(each)}]" for each in answer.decisions)
    return f"[{answer.tokens} tokens, {end}, {answer.repeated_4grams:.0%} repeated{perplexity}]{decided}"


def _decided(decided: Decided) -> str:
    """What a condition decided, in a few words."""
    if math.isnan(decided.value):
        return f"{decided.condition}: holds on {decided.held} of {decided.read} tokens"
    if decided.condition.startswith("@when"):
        return f"{decided.condition}: {decided.value:.3g}, {'holds' if decided.held else 'does not hold'}"
    return f"{decided.condition}: {decided.value:.3g} on average, holds on {decided.held} of {decided.read} tokens"


def read_all_prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of -p, of which `-` is read from the input, and of --prompts. Raises UsageError, ExampleError."""
    prompts = [sys.stdin.read().strip() if text == "-" else text for text in texts]
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", 'give a text: -p "…"')
    if file is not None:
        from probes.data.reading import read_prompts

        prompts += read_prompts(file)[0]
    if not prompts:
        raise UsageError("there is no prompt", 'give one: -p "…"; or a file of them: --prompts FILE')
    return prompts


def require_writable_output(path: Path) -> None:
    """Refuse an output that can't be written. Raises OutputError."""
    from vectors.storage.files import require_writable

    require_writable(path)


def default_strengths(composition: Composition | None, vectors: dict[str, SteeringVector]) -> list[float]:
    """0, half and the whole of what is recommended for a vector; of an expression 0, half and the whole of it."""
    if composition is None:
        return [0.0]
    whole = 1.0
    if len(composition.terms) == 1 and composition.terms[0].operation == "add" and composition.terms[0].value == 1:
        recommended = vectors[composition.terms[0].name].metadata.get("recommended")
        strength = recommended.get("strength") if isinstance(recommended, dict) else None
        whole = float(strength) if isinstance(strength, int | float) and math.isfinite(strength) and strength else 1.0
    return [0.0, whole / 2, whole]


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
