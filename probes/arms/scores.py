"""What many compositions make of the same completions: the log-likelihood of every token, and the KL divergence from
the unsteered model.

Three things are shared, exactly. Below its lowest steered layer a composition changes nothing, so the unsteered
residual stream there is computed once and kept; the blocks above run for several compositions at once. Tokens that
completions share (the chat template's beginning, a prompt with two answers) are computed once for each composition.
Only positions that predict tokens of completions go through the head, for `VALUES` logits of a thread at a time.

What must be computed for each composition is therefore its blocks above the steered layer for each distinct token, and
the head for each distinct position: `tests/bench/sweep.py` says how far from that the time is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.arms.layout import PASS, Part, padded, trees
from probes.arms.passes import Head, heads, passes, stream_at
from probes.capture.activations import length_changes_positions, packable
from probes.interventions import Intervention, no_intervention, steering
from probes.logits import completion_logits
from probes.models import residual
from probes.models.completions import Completion
from probes.models.loading import memory_reported
from probes.models.packed_linear import packed_linear
from probes.models.threads import in_threads
from probes.steered import LayerTerm, Steering, block_hook, require_fit, resolved, terms_by_layer
from vectors.expression import Composition
from vectors.probe import Probe
from vectors.resolve import Composed
from vectors.steering import SteeringVector

VALUES = 2**23  # logits at a time of a thread, of one kind: 32 MiB in float32; with half, a row takes a fifth longer
KEPT = 512 * 2**20  # bytes of residual streams that are kept between calls
KEPT_LOGITS = 256 * 2**20  # bytes of the unsteered model's logits that are kept between calls
SCOPES = ("prompt", "response", "first", "after")

Vectors = Mapping[str, str | Path | SteeringVector | Mapping[int, Tensor]]


class TokenScores(NamedTuple):
    """One composition on the completions, in their order; each tensor is float64 [tokens of the completion].

    `divergences` are KL(unsteered || steered) before each token, in nats; empty where they were not wanted.
    """

    log_likelihoods: list[Tensor]
    divergences: list[Tensor]


class _Arm(NamedTuple):
    """A composition's terms by layer; none for one that changes nothing."""

    by_layer: dict[int, list[LayerTerm]]


class _Base(NamedTuple):
    """The unsteered model at some positions: its logits and probabilities, float32 [n, vocabulary], and log(sum(exp))
    of the logits, float64 [n]."""

    logits: Tensor
    probabilities: Tensor
    totals: Tensor


class Completions:
    """Completions to be scored under many compositions; a class because the unsteered streams live across calls."""

    def __init__(self, model: Any, completions: Sequence[Completion], *, divergence: bool = False) -> None:
        self.model, self.completions, self.divergence = model, list(completions), divergence
        self.parts: list[Part] | None = None
        self.streams: dict[int, list[Tensor]] = {}  # by layer: the unsteered stream of each part
        self.base_logits: dict[tuple[int, int], Tensor] = {}  # by part and first position
        self.base: list[Tensor] = []  # of each part, what the head gets of the unsteered model [n, hidden]

    def scores(
        self,
        compositions: Sequence[Steering | None],
        vectors: Vectors | Sequence[Vectors | None] | None = None,
        *,
        probes: Sequence[Mapping[str, Probe | SteeringVector] | None] | None = None,
        any_base: bool = False,
    ) -> list[TokenScores]:
        """The scores of each composition, None being the unsteered model; they do not depend on the others.

        `vectors` are those that all compositions name, or a list with those of each; `probes` of each what its
        conditions read, where that is not in `vectors`. One with conditions is computed for itself.
        Raises as `probes.steered.steered` does, and ModelError when memory runs out.
        """
        read = [None] * len(compositions) if probes is None else probes
        named = vectors if isinstance(vectors, Sequence) else [vectors] * len(compositions)
        composed = [
            None if each is None else resolved(each, of_each, of_conditions)
            for each, of_each, of_conditions in zip(compositions, named, read, strict=True)
        ]
        used = {id(v): (name, v) for each in composed if each is not None for name, v in each.vectors.items()}
        require_fit(self.model, list(used.values()), any_base)
        with memory_reported(), torch.inference_mode(), packed_linear(self.model):
            shared = bool(self._indices()) and shares_prefixes(self.model, self.completions)
            alone = {
                index: self._one_by_one(compositions[index], named[index], read[index], any_base)
                for index, each in enumerate(composed)
                if not shared or (each is not None and not _can_be_shared(each.composition))
            }
            if len(alone) == len(composed):
                return list(alone.values())
            planned = [
                _Arm({}) if each is None else _Arm(_by_layer(each))
                for index, each in enumerate(composed)
                if index not in alone
            ]
            results = [
                TokenScores(*([torch.empty(0, dtype=torch.float64)] * len(self.completions) for _ in range(2)))
                for _ in planned
            ]
            for number, states in enumerate(self._states(planned)):
                self._score(number, states, results)
        computed = iter(results if self.divergence else [each._replace(divergences=[]) for each in results])
        return [alone[index] if index in alone else next(computed) for index in range(len(composed))]

    def unsteered_logits(self) -> list[Tensor]:
        """The unsteered model's logits before each token of each completion, float32 [tokens, vocabulary] on the CPU.

        Raises ModelError when memory runs out.
        """
        logits = [torch.empty(0)] * len(self.completions)
        with memory_reported(), torch.inference_mode(), packed_linear(self.model):
            if not shares_prefixes(self.model, self.completions):
                for index, values in self._logits():
                    logits[index] = values
                return logits
            self._unsteered()
            with heads(self.model) as head:
                for number, part in enumerate(self._parts()):
                    rows = torch.cat([self._base_logits(number, chunk, head) for chunk in self._chunks(part)]).cpu()
                    for each in part.predicted:
                        logits[each.item] = rows[each.slots]
        return logits

    def _indices(self) -> list[int]:
        """The completions that have tokens, which alone are scored."""
        return [index for index, each in enumerate(self.completions) if each.completion_ids]

    def _logits(self, intervention: Intervention = no_intervention) -> Iterator[tuple[int, Tensor]]:
        """The logits before each token of each completion that has any, float32 [tokens, vocabulary], with its index:
        through hooks alone, which every architecture and every scope allows."""
        indices = self._indices()
        for position, logits in completion_logits(self.model, [self.completions[i] for i in indices], intervention):
            yield indices[position], logits

    def _parts(self) -> list[Part]:
        """The completions as they stand in forward passes; empty ones are left out."""
        if self.parts is None:
            indices = self._indices()
            longest = max((self.completions[index].length for index in indices), default=0)
            laid_out = (trees if packable(self.model, longest) else padded)(self.completions, indices)
            self.parts = [part.to(_device(self.model)) for part in laid_out] if indices else []
        return self.parts

    def _chunks(self, part: Part) -> list[slice]:
        """The positions of a part that go through the head, as many at a time as `VALUES` logits allow."""
        step = max(1, VALUES // int(residual.text_config(self.model).vocab_size))
        return [slice(start, min(start + step, len(part.kept))) for start in range(0, len(part.kept), step)]

    def _unsteered(self) -> list[Tensor]:
        """For each part: what the head gets of the unsteered model, [n, hidden]."""
        if not self.base:
            last, base = len(residual.blocks(self.model)) - 1, []
            for part, stream in zip(self._parts(), self._streams(last), strict=True):
                with passes(self.model, part, (last, stream)) as last_states:
                    base.append(last_states(1, {})[0])
            self.base = base
        return self.base

    def _states(self, arms: Sequence[_Arm]) -> list[list[Tensor]]:
        """For each part: what the head gets for each arm, [n, hidden]; those that change nothing get the unsteered."""
        parts = self._parts()
        by_lowest: dict[int, list[int]] = {}
        for index, arm in enumerate(arms):
            if arm.by_layer:
                by_lowest.setdefault(min(arm.by_layer), []).append(index)
        needed = self.divergence or not all(arm.by_layer for arm in arms)
        base = self._unsteered() if needed else [torch.empty(0)] * len(parts)
        states = [[of_part] * len(arms) for of_part in base]
        for layer in sorted(by_lowest):
            streams = self._streams(layer)
            for number, (part, stream) in enumerate(zip(parts, streams, strict=True)):
                together = max(1, PASS // part.ids.numel())
                of_layer = by_lowest[layer]
                batches = [of_layer[start : start + together] for start in range(0, len(of_layer), together)]
                for batch, rows in zip(batches, self._passes(part, layer, stream, arms, batches), strict=True):
                    for index, row in zip(batch, rows, strict=True):
                        states[number][index] = row
        return states

    def _passes(
        self, part: Part, layer: int, stream: Tensor, arms: Sequence[_Arm], batches: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What the head gets for the arms of each batch, [arms, n, hidden], where all act above the same layer."""
        with passes(self.model, part, (layer, stream)) as last_states:

            def states_of(batch: Sequence[int]) -> Tensor:
                return last_states(len(batch), self._hooks(part, [arms[index] for index in batch]))

            return in_threads(states_of, batches, stream.device)

    def _hooks(self, part: Part, arms: Sequence[_Arm]) -> dict[int, Any]:
        """The hooks of arms whose rows follow each other in one batch."""
        count = len(part.ids)
        by_layer: dict[int, list[LayerTerm]] = {}
        for index, arm in enumerate(arms):
            rows = torch.arange(index * count, (index + 1) * count)
            for layer, terms in arm.by_layer.items():
                by_layer.setdefault(layer, []).extend(term._replace(rows=rows) for term in terms)
        repeated = part._replace(
            depths=part.depths.repeat(len(arms), 1), prompt_lengths=part.prompt_lengths.repeat(len(arms), 1)
        )
        return {layer: block_hook(terms, repeated) for layer, terms in by_layer.items()}

    def _streams(self, layer: int) -> list[Tensor]:
        """The unsteered stream of each part at a layer, computed from the nearest lower one that is kept."""
        if layer not in self.streams:
            lower = max((each for each in self.streams if each < layer), default=None)
            self.streams[layer] = [
                stream_at(self.model, part, layer, None if lower is None else (lower, self.streams[lower][number]))
                for number, part in enumerate(self._parts())
            ]
            size = sum(each.numel() * each.element_size() for each in self.streams[layer])
            for other in sorted(self.streams):
                if len(self.streams) * size > KEPT and other != layer:
                    del self.streams[other]
        return self.streams[layer]

    def _score(self, number: int, states: Sequence[Tensor], results: Sequence[TokenScores]) -> None:
        """Fill in the results of one part from what the head gets for each arm."""
        part = self._parts()[number]
        # A position predicts several tokens where completions part.
        slots = torch.cat([each.slots for each in part.predicted])
        tokens = torch.cat([each.ids for each in part.predicted])
        logs = torch.zeros(len(results), len(slots), dtype=torch.float64)
        divergences = torch.zeros(len(results), len(part.kept), dtype=torch.float64)
        device = states[0].device
        with heads(self.model) as head:
            for chunk in self._chunks(part):
                inside = ((slots >= chunk.start) & (slots < chunk.stop)).nonzero()[:, 0]
                at = (slots[inside] - chunk.start).to(device), tokens[inside].to(device)
                base = _base(self._base_logits(number, chunk, head)) if self.divergence else None
                scored = in_threads(partial(_scored, head, at, base), [each[chunk] for each in states], device)
                for arm, (of_tokens, of_positions) in enumerate(scored):
                    logs[arm, inside] = of_tokens.cpu()
                    if of_positions is not None:
                        divergences[arm, chunk] = of_positions.cpu()
        bounds = torch.tensor([len(each.ids) for each in part.predicted]).cumsum(0)[:-1]
        for arm, result in enumerate(results):
            for each, values in zip(part.predicted, logs[arm].tensor_split(bounds), strict=True):
                result.log_likelihoods[each.item] = values.clone()
                result.divergences[each.item] = divergences[arm][each.slots]

    def _base_logits(self, number: int, chunk: slice, head: Head) -> Tensor:
        """The unsteered model's logits at some positions, float32 [n, vocabulary]; kept while there is room."""
        known = self.base_logits.get((number, chunk.start))
        if known is not None:
            return known
        logits = head(self.base[number][chunk]).float()
        if sum(4 * each.numel() for each in (logits, *self.base_logits.values())) <= KEPT_LOGITS:
            self.base_logits[number, chunk.start] = logits
        return logits

    def _one_by_one(
        self,
        composition: Steering | None,
        vectors: Vectors | None,
        probes: Mapping[str, Probe | SteeringVector] | None,
        any_base: bool,
    ) -> TokenScores:
        """The scores through hooks alone."""
        intervention = (
            no_intervention
            if composition is None
            else steering(self.model, composition, vectors, probes=probes, any_base=any_base)  # type: ignore[arg-type]
        )
        result = TokenScores(*([torch.empty(0, dtype=torch.float64)] * len(self.completions) for _ in range(2)))
        base = dict(self._logits()) if self.divergence else {}
        for index, logits in self._logits(intervention):
            ids = torch.tensor(self.completions[index].completion_ids)
            picked = logits.gather(1, ids[:, None])[:, 0].double()
            result.log_likelihoods[index] = picked - log_sum(logits.clone())
            if self.divergence:
                reference = base[index]
                result.divergences[index] = divergence_from(reference, reference.softmax(-1), logits.clone())
        return result if self.divergence else result._replace(divergences=[])


def _base(logits: Tensor) -> _Base:
    return _Base(logits, logits.softmax(-1), log_sum(logits.clone()))


def _scored(head: Head, at: tuple[Tensor, Tensor], base: _Base | None, states: Tensor) -> tuple[Tensor, Tensor | None]:
    """The log-likelihoods of the tokens `at` (positions and ids [tokens]), float64 [tokens], from what the head gets at
    the positions [n, hidden]; and KL(unsteered || steered) there, float64 [n], where a base is given."""
    logits = head(states).float()
    picked = logits[at].double()
    if base is None:
        return picked - log_sum(logits)[at[0]], None
    values, growth = compared(base.logits, base.probabilities, logits)
    return picked - (base.totals + growth)[at[0]], values


def shares_prefixes(model: nn.Module, completions: Sequence[Completion]) -> bool:
    """Whether blocks below a steered layer can be left out: whether the architecture is one that was tested, and no
    length of a sequence changes the positions of another."""
    longest = max((each.length for each in completions), default=0)
    return residual.continues(model) and not length_changes_positions(residual.text_config(model), longest)


def log_sum(logits: Tensor) -> Tensor:
    """log(sum(exp)) over the vocabulary, float64 [n]; overwrites `logits` (torch sums in pairs, so float32 will do)."""
    greatest = logits.amax(-1, keepdim=True)
    return logits.sub_(greatest).exp_().sum(-1).double().log() + greatest[:, 0].double()


def divergence_from(base: Tensor, probabilities: Tensor, logits: Tensor) -> Tensor:
    """KL(base || other) in nats, float64 [n]; see `compared`. Overwrites `logits`."""
    return compared(base, probabilities, logits)[0]


def compared(base: Tensor, probabilities: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || other) in nats, and by how much log(sum(exp)) of the other's logits exceeds that of the base's.

    Both float64 [n], from the logits of both and the base's probabilities [n, vocabulary]. The divergence is
    log E[exp d] - E[d] with d the difference of the logits and E the base's mean, which keeps small divergences exact;
    its first part is the excess. Overwrites `logits`.
    """
    change = logits.sub_(base)
    total = probabilities.sum(-1).double()  # 1 up to rounding, which would outweigh a small divergence
    mean = (probabilities * change).sum(-1).double() / total
    greatest = change.amax(-1, keepdim=True)
    grown = (change.sub_(greatest).exp_().mul_(probabilities)).sum(-1).double() / total
    excess = grown.log() + greatest[:, 0].double()
    return (excess - mean).clamp_min(0), excess


def _by_layer(composed: Composed) -> dict[int, list[LayerTerm]]:
    by_layer: dict[int, list[LayerTerm]] = {}
    for layer, term in terms_by_layer(composed.composition, composed.vectors, None):
        by_layer.setdefault(layer, []).append(term)
    return by_layer


def _can_be_shared(composition: Composition) -> bool:
    """Whether what a composition does to a token follows from the token's position and the tokens before it, at every
    layer for itself: which scopes allow and conditions do not."""
    known = all(term.scope is None or term.scope.kind in SCOPES for term in composition.terms)
    return known and not composition.conditions


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
