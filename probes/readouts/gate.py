"""A probe's threshold for conditional steering: chosen on one part of the data, reported on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.data.examples import Example
from probes.data.overlap import example_digest, prompt_digest
from probes.readouts.scoring import Pool, pooled
from probes.readouts.thresholds import Rate, Threshold, rate_above, rate_of_tokens_above, threshold_for
from probes.seeds import child_seed
from vectors.errors import ExampleError
from vectors.probe import Probe


class Gate(NamedTuple):
    """A threshold of one layer, and the rates above it on the part that had no influence on it.

    `true_positive` is None without positives; `left_out` counts positives that share a group, prompt or text with
    negatives that chose. With `per_token` rates are of tokens, else of texts. `probe` holds the threshold. `grouped` is
    whether several negatives share a group, a prompt or a text, so that they count as fewer.
    """

    layer: int
    rate: float
    threshold: Threshold
    false_positive: Rate
    true_positive: Rate | None
    per_token: bool
    probe: Probe
    grouped: bool = False
    left_out: int = 0

    @property
    def probability(self) -> float | None:
        """That of so many false positives or more, if both parts are of one kind; None for decisions at tokens, and
        where negatives share groups."""
        if self.per_token or self.grouped:  # tokens of a text, and texts of a group, are alike: that is not known to it
            return None
        return self.threshold.probability_of(self.false_positive.above, self.false_positive.total)

    def report(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "layer": self.layer,
            "threshold": self.threshold.value,
            "stated_false_positive_rate": self.rate,
            "expected_false_positive_rate": self.threshold.bound,
            "chosen_on": self.threshold.chosen_on,
            "unit": "token" if self.per_token else "text",
            "false_positive": _rate(self.false_positive),
            "probability_of_so_many": self.probability,
            "true_positive": None if self.true_positive is None else _rate(self.true_positive),
            "positives_left_out": self.left_out,
        }


def _rate(rate: Rate) -> dict[str, Any]:
    return {"rate": rate.value, "above": rate.above, "of": rate.total, "low": rate.low, "high": rate.high}


def gate(
    probe: Probe,
    layer: int,
    rate: float,
    negatives: tuple[Sequence[Example], Sequence[Tensor]],
    positives: tuple[Sequence[Example], Sequence[Tensor]] | None,
    *,
    tokens: str,
    pool: Pool,
    per_token: bool,
    seed: int,
) -> Gate:
    """The threshold for a false-positive rate, from examples and the scores [tokens that count] of each.

    `tokens`, which says what counted, is only recorded.

    Half of the negatives choose it, by a hash of their prompt or text, so that copies stay together and an example
    never changes sides. The others are for the report, and so are the positives, on which the threshold does not
    depend, but for those that share a group, prompt or text with a negative that chose. With `per_token` a decision is
    made at each token, else once for a text. Raises ExampleError where either half is too small.
    """
    examples, scores = negatives
    choosing = sides_of_negatives(examples, seed)
    chosen = [each for each, first in zip(scores, choosing, strict=True) if first]

    def decisions(texts: Sequence[Tensor]) -> Tensor:
        if per_token:
            return torch.cat(list(texts))
        return torch.stack([pooled(each, range(len(each)), pool) for each in texts])

    threshold = threshold_for(decisions(chosen), rate)

    def rate_of(examples: Sequence[Example], texts: Sequence[Tensor]) -> Rate:
        groups = [group_of(each) for each in examples]
        if per_token:
            return rate_of_tokens_above(texts, threshold.value, seed, groups)
        return rate_above(decisions(texts), threshold.value, groups)

    def reporting(side: tuple[Sequence[Example], Sequence[Tensor]]) -> tuple[list[Example], list[Tensor]]:
        """The examples, with their scores, that share nothing with a negative that chose."""
        kept = [(each, score) for each, score in zip(*side, strict=True) if group_of(each) not in used]
        return [each for each, _ in kept], [score for _, score in kept]

    used = {group_of(each) for each, first in zip(examples, choosing, strict=True) if first}
    grouped = len({group_of(each) for each in examples}) < len(examples)
    true_positive, left_out = None, 0
    if positives is not None:
        reported = reporting(positives)
        left_out = len(positives[0]) - len(reported[0])
        true_positive = rate_of(*reported) if reported[0] else None
    false_positive = rate_of(*reporting(negatives))
    found = Gate(layer, rate, threshold, false_positive, true_positive, per_token, probe, grouped, left_out)
    thresholds = dict(probe.metadata.get("thresholds") or {}) | {str(layer): threshold.value}
    recommended = dict(probe.metadata.get("recommended") or {})
    if recommended.get("layer") != layer:
        recommended = {"layer": layer, "reason": "its threshold was chosen"}
    read = {"tokens": tokens, **({} if per_token else {"pool": pool})}
    changed = {"thresholds": thresholds, "gate": found.report() | read, "recommended": recommended}
    return found._replace(probe=Probe(probe.layers, dict(probe.metadata) | changed))


def sides_of_negatives(examples: Sequence[Example], seed: int) -> list[bool]:
    """Whether each negative belongs to the part that chooses. Raises ExampleError where either part has none."""
    choosing = sides(examples, seed)
    if all(choosing) or not any(choosing):
        raise ExampleError(
            f"the {len(examples)} negatives can't be split into two parts without copies on both sides",
            "give more different negatives",
        )
    return choosing


def sides(examples: Sequence[Example], seed: int) -> list[bool]:
    """Whether each example belongs to the part that chooses, by its group (`group_of`)."""
    return [child_seed(seed, "gate", group_of(example)) % 2 == 0 for example in examples]


def group_of(example: Example) -> str:
    """What names the examples that are alike: their group, else their prompt, else their text."""
    return example.group or prompt_digest(example) or example_digest(example)
