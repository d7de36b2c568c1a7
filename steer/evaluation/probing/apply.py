"""`steer.project` and `steer.activations`: texts onto vectors and probes, and activations with their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from probes.data.examples import Example
from probes.directions.plan import layers_of
from probes.models import residual
from probes.models.loading import LoadedModel, require_devices
from probes.models.tokens import Tokens
from probes.readouts.projection import Projected, readouts_of, token_strings
from probes.readouts.projection import project as project_texts
from probes.readouts.texts import require_tokens, tokenised
from steer.evaluation.probing import opening
from steer.evaluation.probing.opening import Reader
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.probe import Probe
from vectors.registry.layers import layers_given, spans


class Applied(NamedTuple):
    """One vector or probe on every text: the reader itself, and its values."""

    reader: Reader
    texts: list[Projected]


def project(
    text: str,
    vector: str | Path | Reader,
    *,
    layers: str | int | Sequence[int] | None = None,
    model: str | Path | LoadedModel | None = None,
    any_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Projected:
    """A text onto a vector or a probe, token by token: `.tokens`, and `.values` float32 [tokens, layers].

    Of a vector a value is the component along it, in mean displacements; of a probe it is the score, in log-odds.
    `layers` are those where the vector acts, or the one that the probe recommends, or such as "8-15", 12 or [3, 5];
    `model` is the one it was made on.

    Raises ArtifactError, ModelError, UsageError, ExampleError.
    """
    name = opening.name_of(vector)
    found = apply(
        {name: vector}, [Example(text, origin="the text")], layers=layers, model=model, any_base=any_base,
        device=device, dtype=dtype,
    )  # fmt: skip
    return found[name].texts[0]


def apply(
    readers: Mapping[str, str | Path | Reader],
    examples: Sequence[Example],
    *,
    layers: str | int | Sequence[int] | None = None,
    tokens: str = "all",
    model: str | Path | LoadedModel | None = None,
    any_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> dict[str, Applied]:
    """Several vectors and probes on the same texts. Raises as `project` does, with all problems.

    `errors` are problems that were found before, in which case there may be no examples.
    """
    errors = [] if errors is None else errors
    known: dict[str, Reader] = {}
    wanted = None
    with collecting(errors):
        wanted = None if layers is None else layers_given(layers)
    every = isinstance(layers, str) and layers.strip() == "all"
    readouts = {}
    for name, each in readers.items():
        with collecting(errors):
            known[name] = reader = opening.read(each)
            opening.require_site(_site(reader), errors)
            readouts[name] = readouts_of(reader, [*reader.layers] if every else wanted)
    with collecting(errors):
        require_tokens(tokens)
    require_devices(device, dtype, errors)
    opened = opening.open_for([*known.items()], model, errors, any_base=any_base)
    if opened is not None:
        with collecting(errors):
            texts = tokenised(examples, opened.tokenizer, tokens, longest=opened.context_length)
    raise_together(errors)
    assert opened is not None
    loaded = opening.loaded(opened, device, dtype, on_event)
    found = {}
    for name, reader in known.items():
        states = opening.states_of(loaded, _site(reader), list(readouts[name]))
        found[name] = Applied(reader, project_texts(states, loaded.tokenizer, texts, readouts[name], on_event))
    return found


def _site(reader: Reader) -> str:
    return reader.site if isinstance(reader, Probe) else RESIDUAL


class TextActivations(NamedTuple):
    """The activations of one text: its tokens, and float32 [tokens, size] by site and layer, on the CPU."""

    text: str
    tokens: list[str]
    ids: list[int]
    sites: dict[str, dict[int, Tensor]]


def activations(
    texts: str | Sequence[str],
    layers: str | int | Sequence[int] = "all",
    sites: str | Sequence[str] = RESIDUAL,
    *,
    model: str | Path | LoadedModel = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    on_event: OnEvent = ignore,
) -> list[TextActivations]:
    """The activations of plain texts at `layers` (such as "8-15", 12 or [3, 5]) and `sites`, with each token's text.

    "resid_post" is the output of blocks; other sites need the extra `lens` (`probes.readouts.sites.SITES`, or any hook
    of TransformerLens). What further dimensions a site has, such as heads, are put in a row. `model` is a folder, a hub
    id, "smollm2", or what `load_model` gave.

    Raises ExampleError, ModelError, UsageError, with all problems.
    """
    errors: list[SteerError] = []
    wanted_sites = [sites] if isinstance(sites, str) else list(sites)
    for site in wanted_sites:
        opening.require_site(site, errors)
    with collecting(errors):
        given = layers_given(layers)
        spelled = "all" if given is None else spans(given)
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) and text for text in listed):
        errors.append(UsageError("there is no text, or one is empty", "give texts that are not empty"))
    require_devices(device, dtype, errors)
    right = not errors
    opened = opening.open_for([], model, errors)
    if opened is not None and right:
        with collecting(errors):
            numbers = layers_of(spelled, int(residual.text_part(opened.config).num_hidden_layers))
        with collecting(errors):
            read: list[Tokens] = tokenised(
                [Example(text, origin=f"text {n}") for n, text in enumerate(listed, 1)], opened.tokenizer, "all",
                longest=opened.context_length,
            )  # fmt: skip
    raise_together(errors)
    assert opened is not None
    loaded = opening.loaded(opened, device, dtype, on_event)
    found = [
        TextActivations(text, token_strings(each.ids, loaded.tokenizer), list(each.ids), {})
        for text, each in zip(listed, read, strict=True)
    ]
    for site in wanted_sites:
        states = opening.states_of(loaded, site, numbers)

        def keep(index: int, position: int, rows: Tensor, site: str = site) -> None:
            by_layer = found[index].sites.setdefault(site, {})
            by_layer[numbers[position]] = torch.empty_like(rows, device="cpu").copy_(rows)

        states.run(read, numbers, keep, on_event)
    return found
