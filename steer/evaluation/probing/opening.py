"""Opening the model that probes and vectors belong to, after a check that they fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.models import residual
from probes.models.loading import LoadedModel, OpenedModel, load, open_model
from probes.readouts import sites
from probes.readouts.rows import States, residual_states
from vectors import fit
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import ArtifactError, SteerError, UsageError, collecting
from vectors.events import Event, OnEvent
from vectors.probe import Probe, is_probe
from vectors.steering import SteeringVector

Reader = Probe | SteeringVector
LOADING = "loading the model"


class Opened(NamedTuple):
    """A model that is open or loaded, with its configuration and tokenizer."""

    ready: OpenedModel | LoadedModel
    config: Any
    tokenizer: Any

    @property
    def context_length(self) -> int | None:
        """The most tokens of a text."""
        return residual.context_length(self.config)


def read(item: str | Path | Reader) -> Reader:
    """A probe or a vector, from its file if it is none yet. Raises ArtifactError."""
    if isinstance(item, Probe | SteeringVector):
        return item
    path = Path(item)
    return Probe.load(path) if is_probe(path) else SteeringVector.load(path)


def read_probe(item: str | Path | Probe) -> Probe:
    """A probe, from its file if it is none yet. Raises ArtifactError."""
    return item if isinstance(item, Probe) else Probe.load(item)


def open_for(
    readers: Mapping[str, Reader], model: str | Path | LoadedModel | None, *, any_base: bool = False
) -> Opened:
    """Open a model, by default the one that `readers` record as their base, and refuse readers that do not fit it.

    Raises ModelError, ArtifactError and UsageError, before weights are loaded.
    """
    if isinstance(model, LoadedModel):
        opened = Opened(model, model.model.config, model.tokenizer)
    else:
        ready = open_model(model if model is not None else base_reference(readers))
        opened = Opened(ready, ready.config, ready.tokenizer)
    text = residual.text_part(opened.config)
    facts: dict[str, Any] = {
        "hidden_size": int(text.hidden_size),
        "layers": int(text.num_hidden_layers),
        "base": opened.ready.identity,
        "any_base": any_base,
    }
    problems = []
    for name, reader in readers.items():
        if isinstance(reader, Probe):
            problems += fit.problems_of_probe(name, reader, **facts)
        else:
            problems += fit.problems_of(name, reader, **facts)
    if problems:
        raise ArtifactError(problems, "use the model that it was made on, or allow others of the same size: --any-base")
    return opened


def base_reference(readers: Mapping[str, Reader]) -> str:
    """The model that all readers record as their base. Raises UsageError when they record none, or several."""
    bases = [reader.base for reader in readers.values() if "name" in reader.base]
    names = {f"{base['name']}@{base['revision']}" if "revision" in base else str(base["name"]) for base in bases}
    if len(names) == 1:
        return names.pop()
    if names:
        raise UsageError(f"they belong to different models: {', '.join(sorted(names))}", "choose one: --model MODEL")
    raise UsageError(f"{', '.join(readers)} records no model that could be found again", "give it: --model FOLDER")


def loaded(opened: Opened, device: str, dtype: str, on_event: OnEvent) -> LoadedModel:
    """The model with its weights. Raises ModelError, UsageError."""
    ready = opened.ready
    if not isinstance(ready, LoadedModel):
        on_event(Event(LOADING))
        ready = load(ready, device, dtype)
    on_event(Event(LOADING, message=f"model {ready.source}, on {ready.choice}"))
    return ready


def states_of(model: LoadedModel, site: str, layers: Sequence[int]) -> States:
    """The activations of a site; other sites than the output of blocks need TransformerLens. Raises ModelError."""
    if site == RESIDUAL:
        return residual_states(model.model, residual.hidden_size(model.model))
    parameter = next(model.model.parameters())
    return sites.site_states(sites.bridge_of(model, parameter.device, parameter.dtype), site, layers)


def require_site(site: str, errors: list[SteerError]) -> None:
    """Collect what is wrong with a site, and a missing TransformerLens."""
    with collecting(errors):
        sites.require_site(site)
        if site != RESIDUAL:
            sites.require_lens()
