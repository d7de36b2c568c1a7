"""What a sweep reads and checks before a model is opened: all problems of all inputs at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from probes.data import overlap
from probes.data.examples import Example
from probes.data.reading import Contrast, read, read_prompts
from probes.directions.methods import method as find_method
from steer.evaluation.suites.items import Item, Pair, Suite, examples_of
from steer.evaluation.suites.reading import Sources, read_suite
from steer.evaluation.suites.sides import chosen as chosen_items
from steer.evaluation.sweeping.parts import MOST_ITEMS
from steer.evaluation.sweeping.request import Settings, Sides, sides_of
from steer.evaluation.sweeping.sweep import require_settings
from vectors.errors import ExampleError, SteerError, UsageError, collecting, raise_together
from vectors.steering import SteeringVector


class Inputs(NamedTuple):
    """The vector, what messages call it, and what it is swept over.

    Without methods, `suite` and its `sides`, and the `examples` that a learning curve extracts from, or None; with
    methods, the `examples` to extract from, and no suite. `overlap` counts the examples that the vector was extracted
    from, which were allowed.
    """

    vector: SteeringVector
    called: str
    suite: Suite | None
    sides: Sides | None
    examples: Contrast | None
    neutral: list[str]
    overlap: int


def read_inputs(
    vector: str | Path | SteeringVector,
    sources: Sources,
    settings: Settings,
    *,
    methods: Sequence[str] = (),
    allow_overlap: bool = False,
    own_model: bool = True,
    errors: Sequence[SteerError] = (),
) -> Inputs:
    """Read and check everything that a sweep names. `own_model` says that the model is the vector's.

    Items that the vector was extracted from are refused, unless `allow_overlap`. Raises one error with all problems,
    those of `errors` before the others.
    """
    found, loaded = list(errors), None
    with collecting(found):
        loaded = vector if isinstance(vector, SteeringVector) else SteeringVector.load(vector)
    with collecting(found):
        require_settings(settings, _layers(loaded, methods, own_model), extracts=True)
    neutral: list[str] = []
    suite, sides, examples, known = None, None, None, 0
    for name in methods:
        with collecting(found):
            find_method(name)
    if methods:
        with collecting(found):
            examples, neutral = _to_extract_from(sources, settings, allow_overlap)
    else:
        with collecting(found):
            suite = read_suite(sources, settings.seed)
    if suite is not None:
        with collecting(found):
            dev, test = (chosen_items(suite.of(side), MOST_ITEMS, settings.seed) for side in ("dev", "test"))
            sides = sides_of(dev, test, [prompt.text for prompt in suite.neutral])
        if settings.examples:
            with collecting(found):
                examples = _contrast_of(suite.of("test"))
    if loaded is not None and suite is not None:
        with collecting(found):
            if settings.examples:
                find_method(str(loaded.metadata.get("method", {}).get("name") or "diffmean"))
        with collecting(found):
            known = _overlap(loaded, suite, allow_overlap)
    raise_together(found)
    assert loaded is not None
    called = "that was given" if isinstance(vector, SteeringVector) else str(vector)
    return Inputs(loaded, called, suite, sides, examples, neutral, known)


def _layers(vector: SteeringVector | None, methods: Sequence[str], own_model: bool) -> list[int] | None:
    """The layers that there are directions for; None where that is known only when the model is opened."""
    if vector is None:
        return None
    if not methods:
        return sorted(vector.layers)
    count = vector.base.get("layers")
    return list(range(count)) if own_model and isinstance(count, int) else None


def _overlap(vector: SteeringVector, suite: Suite, allowed: bool) -> int:
    """How many of the suite's examples the vector was extracted from. Raises ExampleError unless that is allowed."""
    known = overlap.recorded_examples(
        vector.metadata.get("data", {}), [example for item in suite.items for example in examples_of(item)]
    )
    if known and not allowed:
        raise ExampleError(
            f"the vector was extracted from {len(known)} of the examples ({_names(known)})",
            "give others, or allow it, which the report repeats: --allow-overlap",
        )
    return len(known)


def _names(examples: Sequence[Example]) -> str:
    shown = ", ".join(example.origin or example.completion[:40] for example in examples[:3])
    return shown + (", …" if len(examples) > 3 else "")


def _to_extract_from(sources: Sources, settings: Settings, allow_overlap: bool) -> tuple[Contrast, list[str]]:
    """The examples and neutral prompts of a sweep that extracts anew. Raises SteerError with all problems."""
    errors: list[SteerError] = []
    given = {
        "--suite": sources.suite, "--choices": sources.choices, "--allow-overlap": allow_overlap,
        "--any-base": settings.any_base,
    }  # fmt: skip
    unused = [flag for flag, value in given.items() if value]
    if unused:
        problem = f"--methods extracts anew from files of examples, and has no use for {', '.join(unused)}"
        errors.append(UsageError(problem, "leave out either; examples are given by --pos and --neg, or --pairs"))
    contrast, neutral = None, []
    with collecting(errors):
        contrast = read(sources.pos, sources.neg, sources.pairs)
    if sources.neutral is not None:
        with collecting(errors):
            neutral = read_prompts(sources.neutral)[0]
    raise_together(errors)
    assert contrast is not None
    return contrast, neutral


def _contrast_of(items: Sequence[Item]) -> Contrast:
    """The examples of pairs, to extract from. Raises UsageError for choices."""
    pairs = [item for item in items if isinstance(item, Pair)]
    if len(pairs) < len(items):
        raise UsageError(
            "a learning curve extracts from pairs of examples, and there are multiple-choice questions",
            "leave out --examples, or give --pos and --neg, or --pairs",
        )
    paired = all(pair.positive.context and pair.positive.context == pair.negative.context for pair in pairs)
    return Contrast([pair.positive for pair in pairs], [pair.negative for pair in pairs], paired, {})
