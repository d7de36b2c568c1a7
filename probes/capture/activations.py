"""Mean activations of examples, pooled inside the forward pass: only one row per example and layer is stored.

The common prefix of all examples is computed once. If attention is the only token mixer, the rest is packed as a prefix
tree (`probes.capture.packing`), so that every distinct token is computed once, without padding. Otherwise examples run
in right-padded batches of similar length. The output head and the layers above the last requested one are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.capture.hooks import block_outputs, run
from probes.capture.packing import Pack, common_prefix, packs, passes
from probes.capture.spill import Spill
from probes.capture.tree_attention import tree_attention
from probes.models import residual
from probes.models.tokens import Tokens
from vectors.errors import ModelError
from vectors.events import Event, OnEvent, ignore

PACK = 48  # most tokens of a pack: the cost of attention grows with the square of its size
PASS = 1024  # tokens of a forward pass over many packs: enough for full speed of matrix products
BATCH = 16  # sequences of a padded batch
SHORTEST_PREFIX = 4  # a shorter common prefix is cheaper to compute again than to cache


@dataclass
class Norms:
    """Norms of the counted tokens' residual streams at one layer: their number, sum and maximum.

    A token that several examples share counts once for each example.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """The mean norm."""
        return self.total / max(self.count, 1)

    def add(self, count: int, total: float, largest: float) -> None:
        """Add those of some tokens."""
        self.count += count
        self.total += total
        self.largest = max(self.largest, largest)


@dataclass
class Pooled:
    """The mean activation of every example at every wanted layer, on disk or in memory (`spill`), in input order.

    `computed` counts the tokens that went through the model.
    """

    spill: Spill
    layers: list[int]
    norms: dict[int, Norms] = field(default_factory=dict)
    computed: int = 0

    def add(self, found: Pass) -> None:
        """Add what a pass found. Norms are sums, whose last bits depend on the order of the passes."""
        for position, layer in enumerate(self.layers):
            self.spill.write(position, found.indices, found.rows[position])
            for part in found.norms[position]:
                self.norms[layer].add(*part)
        self.computed += found.computed


class Pass(NamedTuple):
    """What a forward pass found of the examples at `indices`.

    By position of the layer: `rows` are float32 [examples, hidden], `norms` the arguments of `Norms.add`, part by part.
    `computed` counts the tokens that went through the model.
    """

    indices: list[int]
    rows: list[Tensor]
    norms: list[list[tuple[int, float, float]]]
    computed: int


# From the number of passes to the number of each and what it found, in any order: passes that run elsewhere.
Elsewhere = Callable[[int], Iterable[tuple[int, Pass]]]
# From all examples and the layers to where their passes run.
Spread = Callable[[Sequence[Tokens], Sequence[int]], Elsewhere]


def activations(
    model: nn.Module,
    examples: Sequence[Tokens],
    layers: Sequence[int],
    *,
    on_event: OnEvent = ignore,
    spill_above: int | None = None,
    pack: bool | None = None,
    elsewhere: Elsewhere | None = None,
) -> Pooled:
    """The mean residual stream over each example's counted tokens, at `layers`; float32 [hidden] each.

    `pack` forces or forbids packing; by default it follows the architecture. With `elsewhere` the passes are those that
    other processes ran by `passes_of`, with the same numbers. The caller closes `Pooled.spill`.
    Raises ModelError for activations that are not finite, naming layer and example.
    """
    spill = Spill(len(layers), len(examples), residual.hidden_size(model), spill_above)
    result = Pooled(spill, list(layers), {layer: Norms() for layer in layers})
    try:
        job = _Run(model, examples, layers, pack)
        count, waiting = len(job.passes), dict[int, Pass]()
        following = done = 0
        for number, found in elsewhere(count) if elsewhere is not None else job.run(range(count)):
            waiting[number] = found
            done += len(found.indices)
            on_event(Event("measuring activations", done, len(examples), "examples"))
            while following in waiting:
                result.add(waiting.pop(following))
                following += 1
        result.computed += job.prefix
    except BaseException:
        spill.close()
        raise
    return result


def passes_of(
    model: nn.Module, examples: Sequence[Tokens], layers: Sequence[int], numbers: Iterable[int]
) -> list[tuple[int, Pass]]:
    """Some of the passes of `activations` of all these examples, by their numbers. Raises ModelError."""
    return list(_Run(model, examples, layers).run(numbers))


def packable(model: nn.Module, longest: int) -> bool:
    """Whether sequences of up to `longest` tokens can be packed as prefix trees.

    That takes an architecture whose only token mixer is attention, an attention implementation that accepts our masks,
    and no sliding window shorter than the sequences.
    """
    known = residual.architecture(model)
    config = residual.text_config(model)
    windows = [getattr(config, "sliding_window", None)]
    attention = getattr(config, "_attn_implementation", None)
    return (
        known is not None
        and known.packs
        and attention in ("sdpa", "eager")
        and all(not window or longest <= window for window in windows)  # 0 is none
    )


def length_changes_positions(config: Any, longest: int) -> bool:
    """Whether rotary frequencies depend on the longest sequence of a pass, so that each needs a pass of its own.

    "longrope" and "dynamic" do so beyond the original training length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]
    trained = getattr(config, "original_max_position_embeddings", None) or residual.context_length(config) or longest
    return any(
        entry.get("rope_type") in ("longrope", "dynamic")
        and longest > (entry.get("original_max_position_embeddings") or trained)
        for entry in kinds
    )


class _Run:
    """The passes over the examples; a class because the prefix's cache and the hooks' pooling live across packs."""

    def __init__(
        self, model: nn.Module, examples: Sequence[Tokens], layers: Sequence[int], pack: bool | None = None
    ) -> None:
        # Models are causal, so tokens after the last one that counts need not be computed.
        self.examples = examples = [e._replace(ids=e.ids[: e.counted[-1] + 1]) for e in examples]
        self.model, self.layers = model, list(layers)
        self.stack = residual.decoder(model)
        self.device = next(model.parameters()).device
        config = residual.text_config(model)
        longest = max(len(e.ids) for e in examples)
        one_per_pass = length_changes_positions(config, longest)
        share = not one_per_pass and residual.continues(model)
        shared = common_prefix([e.ids for e in examples]) if share and len(examples) > 1 else 0
        self.prefix = shared if shared >= SHORTEST_PREFIX else 0
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.passes: list[list[Pack]] | list[list[int]]  # of packs, or of the indices of padded rows
        if pack if pack is not None else packable(model, longest) and not one_per_pass:
            self.passes = passes(packs([e.ids[self.prefix :] for e in examples], PACK), PASS)
        else:
            order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
            rows = 1 if one_per_pass else BATCH
            self.passes = [order[start : start + rows] for start in range(0, len(order), rows)]
        self.cache: Any = None
        self.prefix_states: dict[int, Tensor] = {}  # [prefix, hidden] by layer, where prefix tokens count

    def run(self, numbers: Iterable[int]) -> Iterator[tuple[int, Pass]]:
        """What the passes of these numbers find."""
        for number in numbers:
            with torch.inference_mode():
                if self.prefix and self.cache is None:
                    self._compute_prefix()
                part = self.passes[number]
                found = self.packed(part) if isinstance(part[0], Pack) else self.padded(part, self.pad)
            yield number, found

    def _compute_prefix(self) -> None:
        from transformers import DynamicCache

        ids = torch.tensor([self.examples[0].ids[: self.prefix]], device=self.device)
        self.cache = DynamicCache(config=residual.text_config(self.model))
        counts = any(e.counted[0] < self.prefix for e in self.examples)

        def store(position: int, states: Tensor) -> None:
            if counts:
                self.prefix_states[position] = states[0].float()

        with block_outputs(self.model, self.layers, store):
            run(self.stack, input_ids=ids, past_key_values=self.cache, use_cache=True)

    def packed(self, pass_packs: Sequence[Pack]) -> Pass:
        """Run packs side by side in one row, each attending to the prefix and itself alone, and pool their examples."""
        masks: list[Tensor] = []
        indices: list[int] = []
        ids: list[int] = []
        depths: list[int] = []
        weights = torch.zeros(sum(len(pack.paths) for pack in pass_packs), sum(len(pack.ids) for pack in pass_packs))
        for pack in pass_packs:
            count = len(pack.ids)
            visible = torch.zeros(count, self.prefix + count, dtype=torch.bool)
            visible[:, : self.prefix] = True
            for index, nodes in pack.paths.items():
                path = torch.tensor(nodes)
                visible[path[:, None], self.prefix + path[None, :]] |= torch.ones(len(path), len(path)).tril().bool()
                counted = self.examples[index].counted
                columns = [len(ids) + nodes[j - self.prefix] for j in counted if j >= self.prefix]
                weights[len(indices), columns] = 1.0 / len(counted)
                indices.append(index)
            masks.append(visible)
            ids += pack.ids
            depths += pack.depths
        try:
            with tree_attention(self.model, self.prefix, [mask.to(self.device) for mask in masks]) as attention_mask:
                return self._pool(
                    indices,
                    weights[:, None, :],
                    input_ids=torch.tensor([ids]),
                    attention_mask=attention_mask,
                    position_ids=torch.tensor([depths]) + self.prefix,
                    past_key_values=self._fork(1),
                )
        except ModelError:
            # NaN spreads to all examples of a pack, even where masked; run alone, the broken example raises by name.
            for index in indices:
                self.padded([index], 0)
            raise

    def padded(self, indices: list[int], pad: int) -> Pass:
        """Run one right-padded batch and pool its examples; causal models are not affected by padding on the right."""
        rows = [self.examples[i].ids[self.prefix :] for i in indices]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), self.prefix + width, dtype=torch.long)
        weights = torch.zeros(len(rows), len(rows), width)
        for row, index in enumerate(indices):
            ids[row, : len(rows[row])] = torch.tensor(rows[row])
            mask[row, : self.prefix + len(rows[row])] = 1
            counted = self.examples[index].counted
            weights[row, row, [j - self.prefix for j in counted if j >= self.prefix]] = 1.0 / len(counted)
        return self._pool(indices, weights, input_ids=ids, attention_mask=mask, past_key_values=self._fork(len(rows)))

    def _pool(self, indices: list[int], weights: Tensor, **inputs: Any) -> Pass:
        """Run the model on `inputs` and give each example's weighted sum; weights are [examples, rows, tokens]."""
        count = len(self.layers)
        found = Pass(indices, [torch.empty(0)] * count, [[] for _ in range(count)], inputs["input_ids"].numel())
        flat = weights.flatten(1).to(self.device)
        prefix = self._prefix_weights(indices)
        times, prefix_times = (flat > 0).sum(0), (prefix > 0).sum(0)

        def sum_up(position: int, states: Tensor) -> None:
            parts = [(flat, states.float().flatten(0, 1), times)]
            if self.prefix_states:
                parts.append((prefix, self.prefix_states[position], prefix_times))
            sums = torch.stack([_weighted_sums(weights, states) for weights, states, _ in parts]).sum(0)
            if not bool(torch.isfinite(sums).all()):
                broken = int((~torch.isfinite(sums)).any(1).nonzero()[0])
                index = indices[broken]
                raise ModelError(
                    f"layer {self.layers[position]} is not finite for example {self.examples[index].origin or index}",
                    "use --dtype float32, or leave that example out",
                )
            found.rows[position] = sums.float().cpu()
            found.norms[position] = [_norms(states, counts) for _, states, counts in parts]

        with block_outputs(self.model, self.layers, sum_up):
            inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            run(self.stack, use_cache=self.cache is not None, **inputs)
        return found

    def _prefix_weights(self, indices: list[int]) -> Tensor:
        weights = torch.zeros(len(indices), self.prefix)
        for row, index in enumerate(indices):
            counted = self.examples[index].counted
            weights[row, [j for j in counted if j < self.prefix]] = 1.0 / len(counted)
        return weights.to(self.device)

    def _fork(self, rows: int) -> Any:
        """A copy of the prefix's cache for `rows` sequences, which can be written to."""
        if self.cache is None:
            return None
        # Recurrent states are updated in place, so the copy is deep; a prefix is short.
        fork = copy.deepcopy(self.cache)
        if rows > 1:
            # Not `batch_repeat_interleave`, which recurrent layers lack.
            fork.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.device))
        return fork


def _norms(states: Tensor, times: Tensor) -> tuple[int, float, float]:
    """Number, sum and maximum of the norms of states [tokens, hidden], each as often as `times` [tokens] says."""
    norms = states.norm(dim=-1).masked_fill(times == 0, 0.0)  # tokens that do not count may be non-finite
    return int(times.sum()), float((norms * times).sum()), float(norms.max())


def _weighted_sums(weights: Tensor, states: Tensor) -> Tensor:
    """weights [examples, tokens] @ states [tokens, hidden]; a token of weight 0 adds nothing, even if not finite."""
    sums = weights @ states
    if not bool(torch.isfinite(sums).all()):
        # 0 * inf is NaN, so one non-finite token would break every example of the pass.
        broken = ~torch.isfinite(states).all(-1)
        sums = weights @ states.masked_fill(broken[:, None], 0)
        sums[((weights > 0) & broken).any(1)] = torch.nan
    return sums
