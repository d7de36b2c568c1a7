"""How spread out attention is: the entropy and the saturation of every head, averaged over the queries of texts.

Attention whose entropy has collapsed passes no gradient through its softmax and can't be trained further (Zhai et al.
2023, "Stabilizing transformer training by preventing attention entropy collapse", arXiv:2303.06296).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.intervals import CONFIDENCE
from probes.models import residual
from probes.models.tokens import Tokens
from probes.statistics.family import family
from probes.statistics.verdict import FEWEST
from vectors.errors import ExampleError, ModelError
from vectors.events import Event, OnEvent, ignore

SATURATED = 0.95  # of a query's attention on one token


class Heads(NamedTuple):
    """The figures of a model's heads, each float64 [texts, heads] by layer: means over the queries of a text.

    `entropy` is relative to that of uniform attention over what a query sees: 1 is uniform, 0 is one token. `saturated`
    is the share of queries with more than `SATURATED` of their attention on one token, `sink` the attention on the
    first token. Queries that see one token do not count.
    """

    entropy: dict[int, Tensor]
    saturated: dict[int, Tensor]
    sink: dict[int, Tensor]


FIGURES = ("entropy", "saturated", "sink")


def heads(model: nn.Module, texts: Sequence[Tokens], *, on_event: OnEvent = ignore) -> Heads:
    """The figures of every head of every layer that has attention, one text at a time.

    The model runs with eager attention, which alone computes the weights. Raises ModelError for a model without
    attention weights, ExampleError for a text of fewer than two tokens.
    """
    short = [text.origin or f"text {i + 1}" for i, text in enumerate(texts) if len(text.ids) < 2]
    if short:
        raise ExampleError(f"{short[0]} has one token, which attends to itself alone", "give longer texts")
    collected = Heads({}, {}, {})
    device = next(model.parameters()).device
    windows = _windows(model)
    with torch.inference_mode(), eager(model):
        for done, text in enumerate(texts, 1):
            with _weights(model) as seen:
                residual.decoder(model)(input_ids=torch.tensor([text.ids], device=device), use_cache=False)
            if not seen:
                raise ModelError(
                    "no block of the model gives attention weights", "use a model with softmax attention in its blocks"
                )
            for layer, weights in seen.items():
                for name, value in zip(FIGURES, of_weights(weights, windows.get(layer)), strict=True):
                    by_layer: dict[int, Any] = getattr(collected, name)
                    by_layer.setdefault(layer, []).append(value)
            on_event(Event("measuring attention", done, len(texts), "texts"))
    return Heads(*({i: torch.stack(rows) for i, rows in sorted(each.items())} for each in collected))  # type: ignore[arg-type]


def of_weights(weights: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, saturation and sink of attention weights [heads, queries, keys] of a causal model, float64 [heads]."""
    rows = weights.double()[:, 1:]
    seen = torch.arange(2, weights.shape[1] + 1, device=weights.device, dtype=torch.float64)
    if window is not None:
        seen = seen.clamp(max=window)
    # Some models also attend to a sink outside of the sequence, so rows may sum to less than 1.
    shares = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -(shares * shares.clamp_min(torch.finfo(torch.float64).tiny).log()).sum(-1)
    relative = (entropy / seen.log().clamp_min(1e-12)).clamp(0.0, 1.0)
    saturated = (shares.amax(-1) > SATURATED).double()
    return relative.mean(-1).cpu(), saturated.mean(-1).cpu(), shares[..., 0].mean(-1).cpu()


class Change(NamedTuple):
    """The mean change of one figure of one head over texts, with the 95 % interval of the paired changes.

    `p_adjusted` is corrected for the number of heads. `changed` says whether it is below 5 %; it is None for fewer
    texts than a verdict takes. A single text has no interval and no p-value.
    """

    layer: int
    head: int
    before: float
    after: float
    low: float | None
    high: float | None
    p_adjusted: float | None
    changed: bool | None

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before


def changes(before: dict[int, Tensor], after: dict[int, Tensor], seed: int) -> list[Change]:
    """The changes of a figure [texts, heads] by layer from one model to another on the same texts, the greatest first.

    All heads are one family (`probes.statistics.family`).
    """
    places = [(layer, head) for layer, rows in before.items() for head in range(rows.shape[1])]
    a, b = (torch.cat([each[layer] for layer in before], 1) for each in (before, after))
    judged = len(a) >= FEWEST
    found = [
        Change(
            *place, float(a[:, i].mean()), float(b[:, i].mean()), member.low, member.high, member.p_adjusted,
            member.p_adjusted < 1 - CONFIDENCE if judged and member.p_adjusted is not None else None,
        )
        for i, (place, member) in enumerate(zip(places, family(b - a, seed=seed), strict=True))
    ]  # fmt: skip
    return sorted(found, key=lambda each: (-abs(each.change), each.layer, each.head))


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes attention weights explicitly. Raises ModelError if it can't."""
    config: Any = residual.text_config(model)
    before = config._attn_implementation
    try:
        config._attn_implementation = "eager"
    except (ValueError, AttributeError) as error:
        raise ModelError(f"the model has no eager attention: {error}", "use another architecture") from error
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _weights(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """A context in which a pass fills a dictionary with the attention weights [heads, queries, keys] of each layer."""
    seen: dict[int, Tensor] = {}

    def taking(layer: int) -> Any:
        def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else ()
            for part in parts:
                square = isinstance(part, Tensor) and part.ndim == 4 and part.shape[2] == part.shape[3]
                if square and bool((part >= 0).all()):
                    seen[layer] = part[0]

        return take

    handles = [
        child.register_forward_hook(taking(layer))
        for layer, block in enumerate(residual.blocks(model))
        for name, child in block.named_children()
        if "attn" in name or "attention" in name
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _windows(model: nn.Module) -> dict[int, int]:
    """The layers with a sliding window, and its size."""
    config = residual.text_config(model)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return {}
    kinds = getattr(config, "layer_types", None)
    count = len(residual.blocks(model))
    return {i: int(window) for i in range(count) if kinds is None or kinds[i] == "sliding_attention"}
