"""Texts onto vectors and probes, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.models.tokens import Tokens
from probes.readouts.rows import States
from probes.readouts.scoring import token_scores
from vectors.errors import ArtifactError
from vectors.events import OnEvent, ignore
from vectors.probe import Probe, Readout
from vectors.registry.layers import spans
from vectors.steering import SteeringVector


class Projected(NamedTuple):
    """A text's tokens and their values, float32 [tokens, layers]; `counted` are the positions that count.

    Of a vector a value is the component along it, in mean displacements: what strength 1 adds is 1. Of a probe it is
    the score, the log-odds of its positive class.
    """

    tokens: list[str]
    ids: list[int]
    counted: list[int]
    layers: list[int]
    values: Tensor


def readouts_of(reader: SteeringVector | Probe, layers: Sequence[int] | None = None) -> dict[int, Readout]:
    """The readouts of a probe or a vector at `layers`; by default where a vector acts, and that a probe recommends.

    Raises ArtifactError for layers that it lacks, or where a vector is zero.
    """
    wanted = list(layers) if layers is not None else [reader.layer] if isinstance(reader, Probe) else [*reader.apply]
    missing = [i for i in wanted if i not in reader.layers]
    if missing:
        kind = "probe" if isinstance(reader, Probe) else "vector"
        raise ArtifactError(f"the {kind} holds no layer {spans(missing)}", f"it holds {spans(reader.layers)}")
    if isinstance(reader, Probe):
        return {i: reader.layers[i] for i in wanted}
    zero = [i for i in wanted if not float(reader.layers[i].norm()) > 0]
    if zero:
        raise ArtifactError(f"the vector is zero at layer {spans(zero)}", "choose other layers")
    return {i: Readout(reader.layers[i] / reader.layers[i].square().sum(), 0.0) for i in wanted}


def project(
    model: nn.Module | States,
    tokenizer: Any,
    texts: Sequence[Tokens],
    readouts: Mapping[int, Readout],
    on_event: OnEvent = ignore,
) -> list[Projected]:
    """The values of every token of each text by the readout of each layer. Raises ModelError."""
    values = token_scores(model, texts, readouts, on_event=on_event)
    return [
        Projected(token_strings(text.ids, tokenizer), list(text.ids), text.counted, list(readouts), each)
        for text, each in zip(texts, values, strict=True)
    ]


def token_strings(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; together they are the whole text.

    A character that is spread over several tokens stands with the last of them, where it is complete.
    """
    strings: list[str] = []
    before: list[int] = []  # the token before, with which a tokenizer decodes a leading space
    pending: list[int] = []
    for i, token in enumerate(ids):
        pending.append(token)
        known = _decoded(before, tokenizer)
        piece = _decoded([*before, *pending], tokenizer)[len(known) :]
        if piece.endswith("\ufffd") and i + 1 < len(ids):
            strings.append("")
            continue
        strings.append(piece)
        before, pending = [token], []
    return strings


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    if not ids:
        return ""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def centre_and_range(
    reader: SteeringVector | Probe, projected: Sequence[Projected], column: int
) -> tuple[float, float]:
    """The value that stands for neither side, and the greatest distance from it, over tokens that count.

    A probe has its threshold. What a vector's component is at rest is not known, so it is the mean over the texts.
    """
    counted = torch.cat([each.values[each.counted, column] for each in projected])
    layer = projected[0].layers[column]
    centre = reader.threshold_at(layer) if isinstance(reader, Probe) else float(counted.mean())
    return centre, float((counted - centre).abs().max())
