"""Planning an extraction: the choices and checks that are possible before a model's weights are loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from probes.data.reading import Contrast
from probes.directions import lengths
from probes.models import residual, tokens
from probes.models.templates import problems_of_rendering
from probes.models.tokens import Tokens
from vectors.errors import ExampleError, ModelError, SteerError, UsageError, collecting, raise_together
from vectors.registry.layers import parse_layers, spans


class Plan(NamedTuple):
    """What goes through the model, and sentences for people about it."""

    layers: list[int]
    tokens: list[Tokens]  # of the positive, then of the negative examples
    note: str  # how the prompts are rendered; empty without prompts
    warnings: tuple[str, ...] = ()  # about the tokens
    by_length: str = ""  # a sentence, where the length alone tells the classes apart


def plan(
    contrast: Contrast,
    tokenizer: Any,
    config: Any,
    *,
    layers: str = "all",
    which: str = "completion",
    truncate: bool,
    match: str | None = None,
) -> Plan:
    """Choose the layers and tokenise the examples for a model of this configuration.

    `match` makes the classes alike in the length or the position of what counts (`probes.directions.lengths`).
    Raises one error with all problems: UsageError, ModelError or ExampleError.
    """
    text = residual.text_part(config)
    both = [*contrast.positive, *contrast.negative]
    longest = residual.context_length(config)
    count = getattr(text, "num_hidden_layers", None)
    if not count:
        raise ModelError("the model's configuration states no number of layers", "use a decoder-only language model")
    errors: list[SteerError] = []
    with collecting(errors):
        wanted = layers_of(layers, int(count))
    with collecting(errors):
        tokenised = tokens.tokenise(both, tokenizer, tokens.choose(which), longest=longest, truncate=truncate)
        chat, note = tokens.templated(both, tokenizer)
        lost = problems_of_rendering(both, tokenizer, chat)
        warnings = (*lost, *equal_tokens(tokenised, contrast, lost))
        if match is not None:
            require_average(which)
            tokenised = lengths.matched(tokenised, len(contrast.positive), contrast.paired, match)
        by_length = lengths.problem_of_lengths(tokenised, len(contrast.positive))
    raise_together(errors)
    return Plan(wanted, tokenised, note, warnings, by_length)


def require_average(which: str) -> None:
    """Refuse --match where one token of each example counts, which has no length to match. Raises UsageError."""
    if tokens.choose(which) not in ("completion", "all"):
        raise UsageError(
            f"--match needs an average over tokens, and --tokens {which} is one", "use --tokens completion"
        )


def equal_tokens(tokenised: list[Tokens], contrast: Contrast, reasons: list[str]) -> list[str]:
    """A sentence about examples whose tokens are the same in both classes.

    Raises ExampleError where that leaves no contrast; `reasons` are what may have caused it.
    """
    positive, paired = len(contrast.positive), contrast.paired
    texts = [(tuple(each.ids), tuple(each.counted)) for each in tokenised]
    positives, negatives = texts[:positive], texts[positive:]
    in_both = {*positives} & {*negatives}
    pairs = zip(positives, negatives, strict=True) if paired else ()
    same = sum(a == b for a, b in pairs) if paired else sum(text in in_both for text in positives)
    if not same:
        return []
    figure = f"{same} of {positive} {'pairs' if paired else 'positive examples'}"
    if {*positives} == {*negatives} or (paired and same == positive):
        raise ExampleError(
            [f"{figure} are the same tokens in both classes, so there is no contrast", *reasons],
            "what tells the classes apart is not in what the model is given; put it into the completions",
        )
    # Examples whose texts are equal are named where the files are read.
    return [] if contrast.warnings else [f"{figure} are the same tokens in both classes"]


def layers_of(text: str, count: int) -> list[int]:
    """The layers that `--layers` names, of a model that has `count`. Raises UsageError, ModelError."""
    wanted = parse_layers(text)
    if wanted is None:
        return list(range(count))
    beyond = [i for i in wanted if i >= count]
    if beyond:
        raise ModelError(
            f"layer {spans(beyond)} is out of range: the model has layers 0 to {count - 1}", "layers count from 0"
        )
    return wanted
