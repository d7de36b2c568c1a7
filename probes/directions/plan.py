"""Everything about an extraction that can be refused before a model's weights are loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from probes.data.reading import Contrast
from probes.models import residual, tokens
from probes.models.tokens import Tokens
from vectors.errors import ModelError, SteerError, collecting, raise_together
from vectors.steering import parse_layers, spans


class Plan(NamedTuple):
    """What goes through the model: the layers, the tokens of the positive and then the negative examples, and how the
    prompts are taken (a sentence, empty when there are none)."""

    layers: list[int]
    tokens: list[Tokens]
    note: str


def plan(
    contrast: Contrast, tokenizer: Any, config: Any, *, layers: str = "all", which: str = "completion", truncate: bool
) -> Plan:
    """Choose the layers and tokenise the examples for a model of this configuration.

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
        _, note = tokens.templated(both, tokenizer)
    raise_together(errors)
    return Plan(wanted, tokenised, note)


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
