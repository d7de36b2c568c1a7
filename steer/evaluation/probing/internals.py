"""`steer probe attribute`, `saturation` and `state`, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from probes.data.examples import Example
from probes.internals.attention import Change, Heads, changes, heads
from probes.internals.attribution import Attribution, require_acting
from probes.internals.attribution import attribute as attribute_parts
from probes.internals.recurrent import Movement, movements, problems_of_states
from probes.models import residual
from probes.models.loading import LoadedModel, require_devices
from probes.readouts import sites
from probes.readouts.texts import require_tokens, tokenised
from steer.evaluation.probing import opening
from steer.evaluation.probing.inputs import examples_of
from vectors.errors import ExampleError, ModelError, SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.fit import recommended_strength
from vectors.probe import Probe
from vectors.steering import SteeringVector


def attribute(
    vector: str | Path | SteeringVector,
    examples: Sequence[Example],
    *,
    probe: str | Path | Probe | None = None,
    layer: int | None = None,
    strength: float | None = None,
    tokens: str = "all",
    heads: bool = False,
    model: str | Path | LoadedModel | None = None,
    any_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> tuple[Attribution, float]:
    """Which components carry a vector's effect on the stream at a layer, and the strength at which it was measured.

    Along a probe's weight at its layer where one is given, else along the effect itself at `layer`, by default the
    last. The strength is the vector's recommended one, or 1. Needs the extra `lens`. Raises SteerError with all
    problems, and with `errors`, which were found before.
    """
    errors = [] if errors is None else errors
    readers: list[tuple[str, opening.Reader]] = []
    read: SteeringVector | None = None
    chosen: Probe | None = None
    with collecting(errors):
        read = vector if isinstance(vector, SteeringVector) else SteeringVector.load(vector)
        readers.append((opening.name_of(vector), read))
    if probe is not None:
        with collecting(errors):
            chosen = opening.read_probe(probe)
            readers.append((opening.name_of(probe), chosen))
            if chosen.site != "resid_post":
                raise UsageError(f"the probe reads {chosen.site}", "use a probe of the site resid_post")
            if layer is not None and layer != chosen.layer:
                chosen.at(layer)
    with collecting(errors):
        sites.require_lens()
    with collecting(errors):
        require_tokens(tokens)
    require_devices(device, dtype, errors)
    opened = opening.open_for(readers, model, errors, any_base=any_base)
    if opened is not None:
        with collecting(errors):
            count = int(residual.text_part(opened.config).num_hidden_layers)
            where = layer if layer is not None else count - 1 if chosen is None else chosen.layer
            if where >= count:
                reason = f"layer {where} is out of range: the model has layers 0 to {count - 1}"
                raise ModelError(reason, "layers count from 0")
            if read is not None:
                require_acting(read, where)
        with collecting(errors):
            texts = tokenised(examples, opened.tokenizer, tokens, longest=opened.context_length)
    raise_together(errors)
    assert read is not None
    assert opened is not None
    loaded = opening.loaded(opened, device, dtype, on_event)
    parameter = next(loaded.model.parameters())
    bridge = sites.bridge_of(loaded, parameter.device, parameter.dtype)
    at = strength if strength is not None else recommended_strength(read) or 1.0
    weight = None if chosen is None else chosen.at(where).weight
    return attribute_parts(bridge, texts, read, at, where, weight, heads=heads, on_event=on_event), at


class Saturation(NamedTuple):
    """The figures of the heads of a model, and of another on the same texts, with the changes where there is one."""

    before: Heads
    after: Heads | None
    changes: dict[str, list[Change]]
    texts: int


def saturation(
    model: str | Path | LoadedModel,
    against: str | Path | LoadedModel | None = None,
    examples: Sequence[Example] = (),
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> Saturation:
    """Attention's entropy and saturation by layer and head; with `against`, what changed from `model` to it.

    `examples` are by default openings of plain texts. One model is in memory at a time. `errors` are problems that were
    found before. Raises ModelError, UsageError, ExampleError, with all problems, before a model is loaded.
    """
    errors = [] if errors is None else errors
    examples = examples or examples_of(())
    require_devices(device, dtype, errors)
    every = [opening.open_for([], each, errors) for each in (model, against) if each is not None]
    opened = [each for each in every if each is not None]
    texts = opening.same_tokens(examples, opened, "all", errors)
    sizes = {(part.num_hidden_layers, part.num_attention_heads) for part in map(_text_part, opened)}
    if len(sizes) > 1:
        errors.append(_other_heads())
    raise_together(errors)
    first, *others = (
        heads(opening.loaded(each, device, dtype, on_event).model, texts, on_event=on_event) for each in opened
    )
    if not others:
        return Saturation(first, None, {}, len(texts))
    second = others[0]
    shapes = [{layer: rows.shape for layer, rows in each.entropy.items()} for each in (first, second)]
    if shapes[0] != shapes[1]:
        raise _other_heads()
    compared = {name: changes(getattr(first, name), getattr(second, name), seed) for name in Heads._fields}
    return Saturation(first, second, compared, len(texts))


def _other_heads() -> ModelError:
    return ModelError("the two models have different layers or heads", "give a model and its fine-tuned copy")


def _text_part(opened: opening.Opened) -> Any:
    return residual.text_part(opened.config)


def state(
    before: str | Path,
    after: str | Path,
    vector: str | Path | SteeringVector,
    examples: Sequence[Example],
    *,
    strength: float | None = None,
    seed: int = 0,
    any_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> tuple[list[Movement], float]:
    """How far the recurrent states after contexts moved from one model to another, along a vector's direction.

    Examples are contexts: prompts in the chat template up to the answer, or plain texts. Also returns the strength that
    a movement of 1 is of. `errors` are problems that were found before, in which case there may be no examples. Raises
    ModelError, ArtifactError, UsageError, ExampleError, with all problems, before a model is loaded.
    """
    errors = [] if errors is None else errors
    read: SteeringVector | None = None
    if len(examples) == 1 or not (examples or errors):
        errors.append(ExampleError(f"{len(examples)} context has no interval", "give two contexts or more"))
    with collecting(errors):
        read = vector if isinstance(vector, SteeringVector) else SteeringVector.load(vector)
    require_devices(device, dtype, errors)
    readers: list[tuple[str, opening.Reader]] = [] if read is None else [(opening.name_of(vector), read)]
    opened = opening.open_for(readers, before, errors, any_base=any_base)
    other = opening.open_for([], after, errors)
    both = [each for each in (opened, other) if each is not None]
    texts = opening.same_tokens(examples, both, "prompt", errors)
    errors += problems_of_states([_text_part(each) for each in both], read)
    raise_together(errors)
    assert read is not None
    assert opened is not None
    assert other is not None
    first = opening.loaded(opened, device, dtype, on_event)
    second = opening.loaded(other, device, dtype, on_event)
    at = strength if strength is not None else recommended_strength(read) or 1.0
    return movements(first.model, second.model, texts, read, at, seed, on_event=on_event), at


def report_of_heads(found: Saturation) -> dict[str, Any]:
    """What `steer probe saturation --json` prints."""

    def rows(each: Heads) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer, "head": head,
                **{name: round(float(getattr(each, name)[layer][:, head].mean()), 4) for name in Heads._fields},
            }
            for layer in each.entropy
            for head in range(each.entropy[layer].shape[1])
        ]  # fmt: skip

    report: dict[str, Any] = {"texts": found.texts, "heads": rows(found.before)}
    if found.after is not None:
        report["against"] = rows(found.after)
        report["changes"] = {
            name: [each._asdict() | {"change": each.change} for each in every] for name, every in found.changes.items()
        }
    return report


def by_layer(each: Heads) -> list[tuple[int, dict[str, float], float]]:
    """For each layer the means of the figures over its heads, and the least entropy of a head."""
    return [
        (
            layer,
            {name: float(getattr(each, name)[layer].mean()) for name in Heads._fields},
            float(torch.min(each.entropy[layer].mean(0))),
        )
        for layer in each.entropy
    ]
