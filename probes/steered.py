"""Steering through hooks: the obvious reference for everything faster, and what `steer try` runs on.

Every operation reads the residual stream h as it left the block, and the changes are summed (`vectors.expression`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes import model as models
from probes import residual
from vectors.errors import ArtifactError, ModelError, UsageError
from vectors.expression import Composition, Scope, Term
from vectors.resolve import compose
from vectors.steering import SteeringVector, spans

Steering = str | Composition | SteeringVector


class _Move(NamedTuple):
    """One term at one layer: its direction [hidden], the rows of the batch it acts on (None: all), and its scope."""

    operation: str
    value: float
    direction: Tensor
    rows: Tensor | None
    scope: Scope | None


@contextlib.contextmanager
def steered(
    model: nn.Module,
    composition: Steering | Sequence[Steering],
    *,
    vectors: Mapping[str, str | Path | SteeringVector] | None = None,
    prompt_length: int | Sequence[int] | None = None,
    any_base: bool = False,
) -> Iterator[None]:
    """Within: the model is steered by a composition, or each row of a batch by its own.

    `composition` is an expression, a file, a vector, or a list of these with one for each row. Names are looked up in
    `vectors`, then as `NAME.safetensors` in the current folder. Scopes count from the prompt: `prompt_length` (without
    padding; one for all rows or one for each), or else the tokens of the first pass of a generation, padding left out
    by the attention mask. `any_base` allows vectors of other models of the same size. The hooks are removed whatever
    happens.

    Raises ExpressionError, ArtifactError, ModelError before anything is hooked; while the model runs, UsageError for a
    batch of another size, and for a scope where nothing says where the prompt ends: no cache and no `prompt_length`.
    """
    several = isinstance(composition, Sequence) and not isinstance(composition, str)
    each: list[Steering] = list(composition) if several else [composition]  # type: ignore[arg-type,list-item]
    if not each:
        raise UsageError("there is no composition", "give at least one")
    moves: dict[int, list[_Move]] = {}
    checked: dict[int, SteeringVector] = {}  # holds them, so that no identity is given away twice
    for row, one in enumerate(each):
        resolved, found = _resolve(one, vectors)
        for name, vector in found.items():
            if id(vector) not in checked:
                check(model, vector, name, any_base=any_base)
                checked[id(vector)] = vector
        for term in resolved.terms:
            # Strength 0 must equal no hook bit for bit, so it hooks nothing.
            if term.operation != "clamp" and term.value == 0:
                continue
            _plan(moves, term, found[term.name], row if several else None)
    rows = len(each) if several else None
    with contextlib.ExitStack() as handles:
        if moves:
            stack_blocks = residual.blocks(model)
            scoped = any(move.scope is not None for planned in moves.values() for move in planned)
            caches = bool(getattr(residual.text_config(model), "use_cache", True))
            positions = _Positions(prompt_length, rows, scoped, caches)
            stack = residual.decoder(model)
            handles.callback(stack.register_forward_pre_hook(positions.see, with_kwargs=True).remove)
            for layer, planned in moves.items():
                # First of the block's hooks, so that whoever else looks, `output_hidden_states` too, sees it steered.
                hook = _hook(planned, positions)
                handles.callback(stack_blocks[layer].register_forward_hook(hook, prepend=True).remove)
        yield


def check(model: nn.Module, vector: SteeringVector, name: str, *, any_base: bool = False) -> None:
    """Refuse a vector that does not fit the model, or was made for another one. Raises ArtifactError, ModelError."""
    size, count = residual.hidden_size(model), len(residual.blocks(model))
    if vector.hidden_size != size:
        raise ArtifactError(
            f"the vector {name} has hidden size {vector.hidden_size}, the model {size}", "use a vector of this model"
        )
    beyond = [i for i in vector.layers if i >= count]
    if beyond:
        raise ModelError(
            f"the vector {name} has layer {spans(beyond)}; the model has layers 0 to {count - 1}",
            "use a vector of this model",
        )
    digest = vector.base.get("digest")
    if digest is None or any_base:
        return
    base = getattr(model, "steer_base", None) or models.base_of(model)
    if base is None:
        warnings.warn(f"it is not known where the model came from, so the base of {name} is unverified", stacklevel=3)
    elif base["digest"] != digest:
        raise ArtifactError(
            f"the vector {name} belongs to {vector.base.get('name', digest)}, "
            f"not to {base.get('name', base['digest'])}",
            "use a vector of this model, or allow another one: --any-base",
        )


def _resolve(
    one: Steering, bindings: Mapping[str, str | Path | SteeringVector] | None
) -> tuple[Composition, dict[str, SteeringVector]]:
    if isinstance(one, SteeringVector):
        return Composition((Term("add", "vector"),)), {"vector": one}
    return compose(str(one), bindings)


def _plan(moves: dict[int, list[_Move]], term: Term, vector: SteeringVector, row: int | None) -> None:
    """Add a term to the moves of each layer it acts at; rows with the same move share one."""
    for layer in term.layers if term.layers is not None else vector.apply:
        direction = vector.layers[layer]
        planned = moves.setdefault(layer, [])
        rows = None if row is None else torch.tensor([row])
        planned.append(_Move(term.operation, term.value, direction, rows, term.scope))


class _Positions:
    """Where the tokens of the running pass stand in their sequences; kept between the passes of a generation."""

    def __init__(self, prompt_length: int | Sequence[int] | None, rows: int | None, scoped: bool, caches: bool) -> None:
        self.given, self.rows, self.scoped, self.caches = prompt_length, rows, scoped, caches
        self.prompts: Tensor | None = None  # [batch]
        self.now: Tensor | None = None  # [batch, tokens]; -1 for padding
        self.before: Tensor | None = None  # the inputs of the last pass that was given no cache

    def see(self, _stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The pre-hook of the decoder: read the positions off its inputs."""
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None and args else ids
        inputs = kwargs["inputs_embeds"] if ids is None else ids
        batch, tokens = inputs.shape[:2]
        if self.rows is not None and batch != self.rows:
            raise UsageError(
                f"the batch has {batch} rows but {self.rows} compositions were given", "give one for each row"
            )
        cache = kwargs.get("past_key_values")
        past = _length(cache)
        if self.scoped and self.given is None and cache is None:
            self._check_prompt_is_known(inputs, kwargs.get("use_cache"))
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            past = max(past, mask.shape[1] - tokens)
            positions = mask.long().cumsum(1) - 1
            now = positions.masked_fill(mask == 0, -1)[:, -tokens:]
        else:
            now = (past + torch.arange(tokens, device=inputs.device)).expand(batch, tokens)
        if past == 0 or self.prompts is None:
            lengths = now.max(1).values + 1 if self.given is None else torch.as_tensor(self.given, device=now.device)
            if lengths.ndim and lengths.shape != (batch,):
                raise UsageError(
                    f"prompt_length has {lengths.numel()} entries, the batch {batch} rows",
                    "give one length for all, or one for each row",
                )
            self.prompts = lengths.expand(batch)
        self.now = now

    def _check_prompt_is_known(self, inputs: Tensor, use_cache: bool | None) -> None:
        """A pass without a cache is all prompt only if it is not a step that computes everything again."""
        caches = self.caches if use_cache is None else use_cache
        before, self.before = self.before, inputs
        if caches and before is not None:
            width = before.shape[1]
            continued = before.shape[0] == inputs.shape[0] and before.ndim == inputs.ndim and width < inputs.shape[1]
            caches = not (continued and torch.equal(before, inputs[:, :width]))
        if not caches:
            raise UsageError(
                "without a cache each pass is a whole sequence: nothing says where the prompt ends, which scopes need",
                "give prompt_length, or generate with a cache",
            )

    def covered(self, scope: Scope | None) -> Tensor:
        """Which tokens of the running pass a scope covers, bool [batch, tokens]; padding never."""
        assert self.now is not None
        assert self.prompts is not None
        real = self.now >= 0
        if scope is None:
            return real
        start, stop = zip(*(scope.span(int(length)) for length in self.prompts), strict=True)
        # Whole numbers, since not every device has float64, and float32 can't tell far positions apart.
        whole = [[int(min(end, 2**62)) for end in ends] for ends in (start, stop)]
        limits = [torch.tensor(ends, device=self.now.device)[:, None] for ends in whole]
        return real & (self.now >= limits[0]) & (self.now < limits[1])


def _length(cache: Any) -> int:
    """How many tokens a cache holds: its layers may not agree, since those that only recur count none."""
    if cache is None:
        return 0
    counts = [layer.get_seq_length for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    return max(int(count()) for count in (cache.get_seq_length, *counts))


def _hook(planned: Sequence[_Move], positions: _Positions) -> Callable[..., Any]:
    """The forward hook of one block."""

    def call(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        states = residual.output_of(output)  # [batch, tokens, hidden]
        stream = states.to(torch.promote_types(states.dtype, torch.float32))
        change = torch.zeros_like(stream)
        for move in planned:
            rows = slice(None) if move.rows is None else move.rows.to(stream.device)
            direction = move.direction.to(stream)
            # Where a model lies on several devices, the positions are where its inputs are.
            covered = positions.covered(move.scope).to(stream.device)[rows, :, None]
            change[rows] += _change(move, direction, stream[rows]) * covered
        # A row that nothing acts on keeps its bits, whatever the dtype.
        moved = (stream + change).to(states.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    return call


def _change(move: _Move, direction: Tensor, stream: Tensor) -> Tensor:
    """What an operation adds to the stream [rows, tokens, hidden]."""
    if move.operation == "add":
        return move.value * direction
    length = direction.norm()
    if float(length) == 0.0:
        return torch.zeros_like(direction)  # no direction, no component along it
    unit = direction / length
    component = (stream @ unit)[..., None]
    if move.operation == "ablate":
        return -move.value * component * unit
    return (move.value * length - component) * unit  # clamp
