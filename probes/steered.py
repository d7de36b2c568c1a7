"""Steering through forward hooks: the reference that faster implementations are tested against; `steer try` uses it.

Every operation reads the residual stream h at the output of the block, and the changes are summed; a rotation turns
what the terms before it have made (`vectors.expression`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from probes.gates import Decisions
from probes.models import loading as models
from probes.models import residual
from probes.models.markers import Markers
from probes.operations import change_of
from vectors import fit
from vectors.errors import UsageError
from vectors.expression import Composition, Condition, Scope, Term
from vectors.probe import Probe
from vectors.resolve import Composed, compose_gated
from vectors.steering import SteeringVector

Steering = str | Path | Composition | SteeringVector | Mapping[int, Tensor]
Sources = Mapping[str, str | Path | SteeringVector | Probe | Mapping[int, Tensor]]
CACHES = ("past_key_values", "cache_params")  # the second is what Mamba calls its own
FORMS = "an expression or a file's path, a Composition, a SteeringVector, or a mapping from layers to tensors [hidden]"


class LayerTerm(NamedTuple):
    """One term at one layer: its direction [hidden], the rows of the batch it acts on (None: all), its scope, the
    conditions that must hold, and the mean projection on the direction, in units of strength.
    """

    operation: str
    value: float
    direction: Tensor
    rows: Tensor | None
    scope: Scope | None
    conditions: tuple[Condition, ...] = ()
    mean: float = 0.0


@contextlib.contextmanager
def steered(
    model: nn.Module,
    composition: Steering | Sequence[Steering],
    *,
    vectors: Sources | None = None,
    probes: Mapping[str, Probe | SteeringVector] | None = None,
    prompt_length: int | Sequence[int] | None = None,
    any_base: bool = False,
    markers: Markers | None = None,
) -> Iterator[Decisions]:
    """A context in which the model is steered by a composition, or each row of a batch by its own.

    `composition` is an expression, a file, a vector, a mapping from layers to tensors [hidden], or a list of these with
    one for each row. Names are looked up in `vectors`, whose values may be files, vectors, probes and such mappings,
    then as `NAME.safetensors` in the current folder; those in conditions before that in `probes`. It gives what the
    conditions decide. Scopes and conditions count from the prompt: `prompt_length` (without padding; one for all rows
    or one for each), or else the tokens of the first pass of a generation, padding left out by the attention mask.
    `markers` are those of the model's sections, by default what `load_model` found. `any_base` allows vectors of other
    models of the same size. The hooks are removed whatever happens.

    Raises TypeError, ExpressionError, ArtifactError, ModelError before anything is hooked; while the model runs,
    UsageError for a batch of another size, for a scope where nothing says where the prompt ends (no cache and no
    `prompt_length`), and for a condition on a prompt whose last token is part of no pass.
    Warns at the end when every term has a scope of the response, and no token of a response came.
    """
    per_row = isinstance(composition, Sequence) and not isinstance(composition, str)
    compositions: list[Steering] = list(composition) if per_row else [composition]  # type: ignore[arg-type,list-item]
    if not compositions:
        raise UsageError("there is no composition", "give at least one")
    by_layer: dict[int, list[LayerTerm]] = {}
    used: dict[int, tuple[str, SteeringVector | Probe]] = {}  # by id(); the reference keeps each id from being reused
    read: dict[Condition, Probe | SteeringVector] = {}
    sections: list[Condition] = []
    conditioned: dict[Condition, list[tuple[int | None, Scope | None]]] = {}  # the scopes of terms with a condition
    for row, item in enumerate(compositions):
        composed = resolved(item, vectors, probes)
        used |= {id(source): (name, source) for name, source in (*composed.vectors.items(), *composed.probes.items())}
        conditions = composed.composition.conditions
        read |= {each: composed.probes[each.name] for each in conditions if not each.is_section}
        sections += [each for each in conditions if each.is_section]
        for term in composed.composition.terms:
            for each in term.conditions:
                conditioned.setdefault(each, []).append((row if per_row else None, term.scope))
        rows = torch.tensor([row]) if per_row else None
        for layer, layer_term in terms_by_layer(composed.composition, composed.vectors, rows):
            by_layer.setdefault(layer, []).append(layer_term)
    require_fit(model, list(used.values()), any_base)
    decisions = Decisions(read, sections, markers or getattr(model, "steer_markers", None), conditioned)
    with contextlib.ExitStack() as handles:
        if by_layer or read or sections:
            stack_blocks = residual.blocks(model)
            scopes = {layer_term.scope for planned in by_layer.values() for layer_term in planned}
            scoped = bool(scopes - {None}) or bool(read or sections)
            caches = bool(getattr(residual.text_config(model), "use_cache", True))
            positions = _Positions(prompt_length, len(compositions) if per_row else None, scoped, caches)
            stack = residual.decoder(model)
            handles.callback(stack.register_forward_pre_hook(positions.update, with_kwargs=True).remove)
            if read or sections:
                begin = stack.register_forward_pre_hook(lambda _stack, _inputs: decisions.begin(positions))
                handles.callback(begin.remove)
            for layer, planned in by_layer.items():
                # First of the block's hooks, so that other hooks and `output_hidden_states` see the steered output.
                hook = block_hook(planned, positions, decisions)
                handles.callback(stack_blocks[layer].register_forward_hook(hook, prepend=True).remove)
            for layer in decisions.readouts:
                hook = decisions.hook(layer, positions)
                handles.callback(stack_blocks[layer].register_forward_hook(hook).remove)
        yield decisions
        if (
            by_layer
            and positions.current is not None
            and not positions.reached_response
            and all(s and s.responds for s in scopes)
        ):
            names = ", ".join(sorted(map(str, scopes)))
            warnings.warn(
                f"nothing was steered: {names} counts from the end of the prompt, and no token came after it "
                "(give prompt_length where a whole text is passed)",
                stacklevel=3,
            )


def require_fit(model: nn.Module, vectors: Sequence[tuple[str, SteeringVector | Probe]], any_base: bool) -> None:
    """Check that vectors and probes fit the model and were made for it. Raises ArtifactError, ModelError."""
    size, count = residual.hidden_size(model), len(residual.blocks(model))
    bound = [name for name, vector in vectors if vector.base.get("digest") and not any_base]
    base = (getattr(model, "steer_base", None) or models.base_of(model)) if bound else None
    fit.require_fit(vectors, hidden_size=size, layers=count, base=base, any_base=any_base)
    if bound and base is None:
        names = ", ".join(dict.fromkeys(bound))
        warnings.warn(f"it is not known where the model came from, so the base of {names} is unverified", stacklevel=4)


def resolved(
    item: Steering, vectors: Sources | None = None, probes: Mapping[str, Probe | SteeringVector] | None = None
) -> Composed:
    """The composition that an expression, a file, a vector or a mapping stands for, its vectors and probes by name.

    Raises TypeError for anything else; ExpressionError, ArtifactError.
    """
    bindings = {
        name: as_vector(vector) if isinstance(vector, Mapping) else vector for name, vector in (vectors or {}).items()
    }
    if isinstance(item, Mapping):
        item = as_vector(item)
    if isinstance(item, SteeringVector):
        return Composed(Composition((Term("add", "vector"),)), {"vector": item}, {})
    if not isinstance(item, str | Path | Composition):
        raise TypeError(f"a {type(item).__name__} is no composition: give {FORMS}")
    if isinstance(item, Composition) and not item.terms:
        return Composed(item, {}, {})  # a row of a batch that is not steered
    composed = compose_gated(str(item), {**(probes or {}), **bindings}, allow_strength=True)
    # What a condition reads stays the same where a control replaces the vector of that name.
    return composed._replace(probes={name: (probes or {}).get(name, each) for name, each in composed.probes.items()})


def as_vector(layers: Mapping[int, Tensor]) -> SteeringVector:
    """A mapping from layers to tensors [hidden] as a vector. Raises TypeError for anything else."""
    wrong = [key for key, value in layers.items() if not isinstance(key, int) or not isinstance(value, Tensor)]
    if wrong:
        entry = layers[wrong[0]]
        raise TypeError(
            f"{wrong[0]!r}: {type(entry).__name__} is not a layer's number with a tensor; a composition is {FORMS}"
        )
    return SteeringVector(layers)


def terms_by_layer(
    composition: Composition, vectors: Mapping[str, SteeringVector], rows: Tensor | None
) -> Iterator[tuple[int, LayerTerm]]:
    """What a composition does at each layer where it acts, in the order of its terms; `rows` None means all rows."""
    for term in composition.terms:
        # Strength 0 must equal no hook bit for bit, so it hooks nothing.
        if term.operation != "clamp" and term.value == 0:
            continue
        vector = vectors[term.name]
        for layer in vector.acting(term.layers):
            mean = (vector.mean_at(layer) or 0.0) if term.operation == "mean_ablate" else 0.0
            direction = vector.layers[layer]
            yield layer, LayerTerm(term.operation, term.value, direction, rows, term.scope, term.conditions, mean)


class Coverage(Protocol):
    """What a block's hook asks of the running pass."""

    def covered(self, scope: Scope | None) -> Tensor:
        """Which tokens of the running pass a scope covers, bool [batch, tokens]; never padding."""


class _Positions:
    """The positions of the running pass's tokens in their sequences; it lives across the passes of a generation."""

    def __init__(self, prompt_length: int | Sequence[int] | None, rows: int | None, scoped: bool, caches: bool) -> None:
        self.prompt_length, self.rows, self.scoped, self.uses_cache = prompt_length, rows, scoped, caches
        self.prompt_lengths: Tensor | None = None  # int64 [batch]: as given, or from the first pass
        self.current: Tensor | None = None  # int64 [batch, tokens]; -1 for padding
        self.previous_inputs: Tensor | None = None  # the inputs of the last pass without a cache
        self.ids: Tensor | None = None  # int64 [batch, tokens], of the running pass
        self.sequences = 0  # how many times a pass has begun new sequences
        self.reached_response = False  # whether a token came after its prompt; only with scopes

    def update(self, _stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The pre-hook of the decoder: takes the positions from its inputs."""
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None and args else ids
        inputs = kwargs["inputs_embeds"] if ids is None else ids
        self.ids = ids
        batch, tokens = inputs.shape[:2]
        if self.rows is not None and batch != self.rows:
            raise UsageError(
                f"the batch has {batch} rows but {self.rows} compositions were given", "give one for each row"
            )
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past = _length(cache)
        if self.scoped and self.prompt_length is None and cache is None:
            self._check_prompt_is_known(inputs, kwargs.get("use_cache"))
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            past = max(past, mask.shape[1] - tokens)
            positions = mask.long().cumsum(1) - 1
            current = positions.masked_fill(mask == 0, -1)[:, -tokens:]
        elif past == 0 and _holds_state(cache) and (self.scoped or self.current is not None):
            # Recurrent layers alone don't count their tokens, so they go on from those of the pass before.
            if self.current is None:
                raise UsageError(
                    "nothing says how many tokens the recurrent state holds, which scopes need",
                    "compute the prompt within the steered passes too",
                )
            current = self.current.max(1, keepdim=True).values + 1 + torch.arange(tokens, device=inputs.device)
            past = int(current.max())
        else:
            current = (past + torch.arange(tokens, device=inputs.device)).expand(batch, tokens)
        if past == 0 or self.prompt_lengths is None:
            lengths = (
                current.max(1).values + 1
                if self.prompt_length is None
                else torch.as_tensor(self.prompt_length, device=current.device)
            )
            if lengths.ndim and lengths.shape != (batch,):
                raise UsageError(
                    f"prompt_length has {lengths.numel()} entries, the batch {batch} rows",
                    "give one length for all, or one for each row",
                )
            self.prompt_lengths = lengths.expand(batch)
            self.sequences += 1
        self.current = current
        self.reached_response = self.reached_response or (
            self.scoped and bool((current >= self.prompt_lengths[:, None]).any())
        )

    def _check_prompt_is_known(self, inputs: Tensor, use_cache: bool | None) -> None:
        """Raise UsageError for a pass without a cache that may be a generation step over the whole sequence."""
        cached = self.uses_cache if use_cache is None else use_cache
        previous, self.previous_inputs = self.previous_inputs, inputs
        if cached and previous is not None:
            width = previous.shape[1]
            continued = (
                previous.shape[0] == inputs.shape[0] and previous.ndim == inputs.ndim and width < inputs.shape[1]
            )
            cached = not (continued and torch.equal(previous, inputs[:, :width]))
        if not cached:
            raise UsageError(
                "without a cache each pass is a whole sequence: nothing says where the prompt ends, which scopes need",
                "give prompt_length, or generate with a cache",
            )

    def covered(self, scope: Scope | None) -> Tensor:
        """Which tokens of the running pass a scope covers, bool [batch, tokens]; never padding."""
        assert self.current is not None
        assert self.prompt_lengths is not None
        real = self.current >= 0
        if scope is None:
            return real
        start, stop = zip(*(scope.span(int(length)) for length in self.prompt_lengths), strict=True)
        # Integers, since not every device has float64, and float32 is not exact for large positions.
        whole = [[int(min(end, 2**62)) for end in ends] for ends in (start, stop)]
        limits = [torch.tensor(ends, device=self.current.device)[:, None] for ends in whole]
        return real & (self.current >= limits[0]) & (self.current < limits[1])


def _holds_state(cache: Any) -> bool:
    """Whether a cache has recurrent states of earlier tokens."""
    states = (getattr(layer, "has_previous_state", {}) for layer in getattr(cache, "layers", ()))
    return any(any(held.values()) for held in states if isinstance(held, dict))


def _length(cache: Any) -> int:
    """How many tokens a cache holds: the maximum over layers, since recurrent layers report none."""
    if cache is None:
        return 0
    layers = getattr(cache, "layers", ())
    counts = [layer.get_seq_length for layer in layers if hasattr(layer, "get_seq_length")]
    if layers and not counts:
        return 0
    return max(int(count()) for count in (cache.get_seq_length, *counts))


def block_hook(
    planned: Sequence[LayerTerm], positions: Coverage, decisions: Decisions | None = None
) -> Callable[..., Any]:
    """The forward hook of one block; without `decisions` no term has conditions."""

    def call(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        states = residual.output_of(output)  # [batch, tokens, hidden]
        stream = states.to(torch.promote_types(states.dtype, torch.float32))
        read = stream  # what operations read: the stream, or what the last rotation has made of it
        change = torch.zeros_like(stream)
        for layer_term in planned:
            rows = slice(None) if layer_term.rows is None else layer_term.rows.to(stream.device)
            direction = layer_term.direction.to(stream)
            # If a model is spread over several devices, the positions are on the device of its inputs.
            covered = positions.covered(layer_term.scope)
            for condition in layer_term.conditions:
                assert decisions is not None
                covered = covered & decisions.holds(condition, covered).to(covered.device)
            acts = covered.to(stream.device)[rows, :, None]
            turns = layer_term.operation == "rotate"
            if turns:
                read = _moved(read, stream, change, rows, acts)
            operation, value, mean = layer_term.operation, layer_term.value, layer_term.mean
            change[rows] += change_of(operation, value, direction, read[rows], mean) * acts
            if turns:
                read = _moved(read, stream, change, rows, acts)
        # Adding 0.0 leaves a row that nothing acts on unchanged bit for bit, in every dtype.
        steered_states = (stream + change).to(states.dtype)
        return steered_states if isinstance(output, Tensor) else (steered_states, *output[1:])

    return call


def _moved(read: Tensor, stream: Tensor, change: Tensor, rows: Any, acts: Tensor) -> Tensor:
    """What operations read from here on: where a rotation acts, the stream as it has been changed so far."""
    moved = read.clone()
    moved[rows] = torch.where(acts, stream[rows] + change[rows], read[rows])
    return moved
