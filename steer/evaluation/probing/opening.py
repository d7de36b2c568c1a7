"""Opening the model that probes and vectors belong to, after a check that they fit it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data.examples import Example
from probes.models import residual
from probes.models.loading import LoadedModel, OpenedModel, load, open_model
from probes.models.tokens import Tokens
from probes.readouts import sites
from probes.readouts.rows import States, residual_states
from probes.readouts.texts import tokenised
from vectors import fit, references
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import ArtifactError, ModelError, SteerError, UsageError, collecting
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


def name_of(item: str | Path | Reader) -> str:
    """What messages call a vector or a probe, after its kind: its file, where it was read from one."""
    return str(item) if isinstance(item, str | Path) else "that was given"


def open_for(
    readers: Sequence[tuple[str, Reader]],
    model: str | Path | LoadedModel | None,
    errors: list[SteerError],
    *,
    any_base: bool = False,
) -> Opened | None:
    """Open a model, by default the one that `readers` record as their base, and collect why readers do not fit it.

    None where it can't be opened, or need not be: without a model and readers there is none to be found, and what must
    be downloaded first is not while `errors` holds a problem. Weights are not loaded. `readers` come with their names.
    """
    opened = None
    with collecting(errors):
        if model is None and not readers:
            if errors:  # of those that were to be read
                return None
            raise UsageError("no model is given", "give it: --model MODEL")
        if isinstance(model, LoadedModel):
            opened = Opened(model, model.model.config, model.tokenizer)
        else:
            reference = str(model) if model is not None else base_reference(readers)
            if errors and not references.at_hand(reference):
                return None
            ready = open_model(reference)
            opened = Opened(ready, ready.config, ready.tokenizer)
    if opened is None:
        return None
    text = residual.text_part(opened.config)
    facts: dict[str, Any] = {
        "hidden_size": int(text.hidden_size),
        "layers": int(text.num_hidden_layers),
        "base": references.identified(opened.ready.source, opened.ready.identity),
        "any_base": any_base,
    }
    problems = []
    for name, reader in readers:
        if isinstance(reader, Probe):
            problems += fit.problems_of_probe(name, reader, **facts)
        else:
            problems += fit.problems_of(name, reader, **facts)
    if problems:
        hint = "use the model that it was made on, or allow others of the same size: --any-base"
        errors.append(ArtifactError(problems, hint))
    return opened


def same_tokens(
    examples: Sequence[Example], models: Sequence[Opened], which: str, errors: list[SteerError]
) -> list[Tokens]:
    """The tokens of examples, of which models to compare must have the same; their problems are collected."""
    found: list[list[Tokens]] = []
    for model in models:
        with collecting(errors):
            found.append(tokenised(examples, model.tokenizer, which, longest=model.context_length))
    if len(found) > 1 and [each.ids for each in found[0]] != [each.ids for each in found[1]]:
        errors.append(ModelError("the two models have different tokenizers", "give a model and its fine-tuned copy"))
    return found[0] if found else []


def base_reference(readers: Sequence[tuple[str, Reader]]) -> str:
    """The model that all readers record as their base. Raises UsageError when they record none, or several."""
    bases = [reader.base for _, reader in readers if "name" in reader.base]
    names = {f"{base['name']}@{base['revision']}" if "revision" in base else str(base["name"]) for base in bases}
    if len(names) == 1:
        return names.pop()
    if names:
        raise UsageError(f"they belong to different models: {', '.join(sorted(names))}", "choose one: --model MODEL")
    unnamed = [f"the {'probe' if isinstance(reader, Probe) else 'vector'} {name}" for name, reader in readers]
    raise UsageError(
        f"{' and '.join(unnamed)} record{'s'[: len(unnamed) == 1]} no model that could be found again",
        "give it: --model FOLDER",
    )


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
