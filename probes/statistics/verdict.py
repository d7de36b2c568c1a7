"""Whether an arm works: it beats every control on the same items, by paired intervals corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from probes.intervals import CONFIDENCE
from probes.statistics.correction import holm
from probes.statistics.paired import Difference, against_draws

FEWEST = 30  # items below which there are figures and no verdict
FEWEST_GROUPS = 8  # groups below which the variation between groups can't be estimated

Outcome = Literal["works", "does not work", "too few items"]


class Compared(NamedTuple):
    """A subject against one control: the paired difference, and its p-value corrected for the number of controls.

    `draws` is the number of arms that were drawn at random for this control; 1 for a single arm. `detectable` is the
    smallest true difference that would be found with 80 % probability, at the level that Holm's correction asks for
    where all controls are beaten; NaN where nothing varies. `beaten` is None where items or groups are too few to say.
    """

    control: str
    difference: Difference
    p_adjusted: float
    beaten: bool | None
    draws: int
    detectable: float


class Verdict(NamedTuple):
    """The outcome, the comparison with every control, and the reason as one sentence."""

    outcome: Outcome
    reason: str
    against: list[Compared]


def too_few_to_say(items: int, groups: int, what: str = "item") -> str:
    """Why so many items (or what they are called), in so many groups, are too few for a verdict; empty where they are
    enough.

    An item without a group is one of its own. With fewer groups the interval of a mean is too narrow: of 2 groups whose
    true means are zero, one in five comes out as an effect at the 5 % level.
    """
    if items < FEWEST:
        only = f"is only 1 {what}" if items == 1 else f"are only {items} {what}s"
        return f"there {only}; a verdict takes at least {FEWEST}"
    if groups < FEWEST_GROUPS:
        belong = f"the items belong to {groups} group{'s'[: groups != 1]}"
        return f"{belong}; a verdict takes at least {FEWEST_GROUPS}"
    return ""


def verdict(
    subject: Tensor, controls: Mapping[str, Tensor], groups: Sequence[str] | None = None, *, seed: int = 0
) -> Verdict:
    """Judge a subject [items] against controls [draws, items] by name; all are figures of the same items.

    A control with several draws stands for the distribution that they come from: the subject must lie beyond what one
    more draw would give. It works if it beats every control at the 5 % level by Holm's correction.
    """
    differences = {
        name: against_draws(subject, draws, groups, seed=seed) for name, draws in controls.items() if len(draws)
    }
    adjusted = holm([each.p for each in differences.values()])

    # All are rejected if the p-values are at most 5 %, 5 % / 2, ... in any order. What is hardest to tell apart has the
    # greatest one.
    def hardness(name: str) -> float:
        size = differences[name].detectable
        return 0.0 if math.isnan(size) else size

    order = sorted(differences, key=hardness, reverse=True)
    detectable = {
        name: against_draws(
            subject, controls[name], groups, seed=seed, confidence=1 - (1 - CONFIDENCE) / rank
        ).detectable
        for rank, name in enumerate(order, 1)
    }
    against = [
        Compared(name, each, p, p < 1 - CONFIDENCE and each.mean > 0, len(controls[name]), detectable[name])
        for (name, each), p in zip(differences.items(), adjusted, strict=True)
    ]
    too_few = too_few_to_say(len(subject), len(subject) if groups is None else len(set(groups)))
    if too_few:
        return Verdict("too few items", too_few, [each._replace(beaten=None) for each in against])
    unbeaten = [each.control for each in against if not each.beaten]
    if not against:
        return Verdict("does not work", "there is nothing to compare it with", against)
    if unbeaten:
        return Verdict("does not work", f"it does not beat {', '.join(unbeaten)}", against)
    return Verdict("works", f"it beats {', '.join(each.control for each in against)}", against)
