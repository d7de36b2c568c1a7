"""Texts coloured token by token, by the values of probes and vectors."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steer.reports import page

if TYPE_CHECKING:
    from steer.evaluation.probing.apply import Applied

SCORE = "score, the log-odds of the positive class"
COMPONENT = "component along the vector, in mean displacements (what strength 1 adds is 1)"
POSITIVE, NEGATIVE = (214, 96, 20), (33, 102, 172)  # orange and blue, which colour-blind people tell apart
LIGHTEST = 0.04  # of the range: a weaker value has no colour


def report(applied: Mapping[str, Applied]) -> dict[str, Any]:
    """Readers, and every text's tokens with a value for each reader and layer, as JSON values."""
    from probes.readouts.projection import centre_and_range
    from vectors.probe import Probe

    readers: list[dict[str, Any]] = []
    for name, each in applied.items():
        for column, layer in enumerate(each.texts[0].layers):
            centre, width = centre_and_range(each.reader, each.texts, column)
            probe = isinstance(each.reader, Probe)
            readers.append(
                {
                    "name": name, "layer": layer, "kind": "probe" if probe else "vector", "digest": each.reader.digest,
                    "unit": SCORE if probe else COMPONENT, "centre": centre, "range": width, "column": len(readers),
                }
            )  # fmt: skip
    texts = []
    for number, first in enumerate(next(iter(applied.values())).texts):
        columns = [
            each.texts[number].values[:, column].tolist()
            for each in applied.values()
            for column in range(len(each.texts[number].layers))
        ]
        counted = {*first.counted}
        tokens = [
            {"token": token, "id": first.ids[i], "counts": i in counted, "values": [column[i] for column in columns]}
            for i, token in enumerate(first.tokens)
        ]
        means = [sum(column[i] for i in first.counted) / len(first.counted) for column in columns]
        texts.append(
            {"tokens": tokens, "means": means, "greatest": [max(c[i] for i in first.counted) for c in columns]}
        )
    return {"readers": readers, "texts": texts}


def shade(value: float, centre: float, width: float) -> tuple[tuple[int, int, int], float]:
    """The colour of a value, and how strong it is in [0, 1]: orange above the centre, blue below."""
    share = 0.0 if not width > 0 else max(-1.0, min(1.0, (value - centre) / width))
    strength = abs(share) if abs(share) > LIGHTEST else 0.0
    return (POSITIVE if share > 0 else NEGATIVE), strength


def page_of(found: Mapping[str, Any]) -> str:
    """The page: each reader's texts in colours, with the value of a token where the mouse rests."""
    parts = []
    for reader in found["readers"]:
        heading = f"{reader['name']}, layer {reader['layer']}"
        low, high = reader["centre"] - reader["range"], reader["centre"] + reader["range"]
        parts.append(
            f"<h2>{html.escape(heading)}</h2><p class='note'>{html.escape(reader['unit'])}: {_legend(low, high)}</p>"
        )
        for text in found["texts"]:
            column = reader["column"]
            spans = "".join(_span(token, reader, column) for token in text["tokens"])
            figures = f"mean {text['means'][column]:.3g}, greatest {text['greatest'][column]:.3g}"
            parts.append(f"<p style='white-space:pre-wrap;line-height:1.9'>{spans}</p><p class='note'>{figures}</p>")
    note = page.notes(["Grey tokens (the first, and special ones) do not count: no colour, mean or range is of them."])
    facts = page.facts({reader["name"]: reader["digest"] for reader in found["readers"]})
    return page.page("Token by token", "".join(parts) + note + facts, "what steer probe apply --json prints")


def _span(token: Mapping[str, Any], reader: Mapping[str, Any], column: int) -> str:
    value = token["values"][column]
    title = html.escape(f"{token['token']!r}: {value:.3g}")
    text = html.escape(token["token"])
    if not token["counts"]:
        return f"<span style='color:#999' title='{title}'>{text}</span>"
    (red, green, blue), strength = shade(value, reader["centre"], reader["range"])
    colour = f"rgba({red},{green},{blue},{0.75 * strength:.2f})"
    return f"<span style='background:{colour};border-radius:2px' title='{title}'>{text}</span>"


def _legend(low: float, high: float) -> str:
    colours = [shade(step / 5, 0.0, 1.0) for step in range(-5, 6)]
    steps = "".join(
        f"<span style='padding:0 .6em;background:rgba{(*colour, round(0.75 * strength, 2))}'></span>"
        for colour, strength in colours
    )
    return f"<span style='white-space:nowrap'>{low:.3g} {steps} {high:.3g}</span>"
