"""What to do about an arm: the decision that follows from an interval, the effect that matters, and the checks.

After the decision states of GrowthBook. A state is the same at every look: nothing is gained by looking often.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from steer.experiments.statistics.sequences import ALPHA, FEWEST, TUNED_AT, Difference, half_width

State = Literal["unhealthy", "keep running", "ship", "roll back", "no difference", "selected", "not selected"]


class Decision(NamedTuple):
    """A state, the sentence that says why, and about how many more units it takes (0 once it is decided).

    The last two states are of adaptive weights, the last also of a control that an arm is better than.
    """

    state: State
    reason: str
    more_units: int = 0


def decide(
    difference: Difference,
    smallest_effect: float,
    *,
    higher_is_better: bool = True,
    unhealthy: tuple[str, ...] = (),
    breached: tuple[str, ...] = (),
    alpha: float = ALPHA,
    tuned_at: float = TUNED_AT,
    fewest: int = FEWEST,
    planned: int | None = None,
) -> Decision:
    """The decision about one arm against the control, on the primary metric.

    `unhealthy` are reasons why no result can be believed (a sample-ratio mismatch); `breached` names guardrails whose
    one-sided bound is outside of the limit. `smallest_effect` > 0 is the smallest effect of interest; `planned` the
    units of both arms that see it, by what was expected before there were any, where that is known.
    """
    if unhealthy:
        return Decision("unhealthy", "; ".join(unhealthy))
    if breached:
        return Decision("roll back", f"guardrail breached: {', '.join(breached)}")
    if math.isnan(difference.low):
        if difference.standard_error == 0:
            return Decision("keep running", "the metric has not varied yet", fewest)
        return Decision("keep running", f"fewer than {fewest} units in an arm", _left(difference, fewest, planned))
    low, high = (difference.low, difference.high) if higher_is_better else (-difference.high, -difference.low)
    if low > 0:
        return Decision("ship", "better than the control: the interval lies above no difference")
    if high < 0:
        return Decision("roll back", "worse than the control: the interval lies below no difference")
    if -smallest_effect < low and high < smallest_effect:
        return Decision(
            "no difference", f"no difference larger than the smallest effect of interest, {smallest_effect:g}"
        )
    more = more_units(difference, smallest_effect, alpha=alpha, tuned_at=tuned_at)
    return Decision("keep running", "the interval still holds both no difference and one that matters", more)


def _left(difference: Difference, fewest: int, planned: int | None) -> int:
    return max(max(2 * fewest, planned or 0) - difference.units, 1)


def more_units(
    difference: Difference, smallest_effect: float, *, alpha: float = ALPHA, tuned_at: float = TUNED_AT
) -> int:
    """About how many more units decide, if the difference stays as it is now: by excluding 0, or by equivalence.

    The interval must become narrower than the difference, or than its distance from the smallest effect of interest.
    """
    now = abs(difference.estimate)
    target = max(now, smallest_effect - now)
    if not target > 0:
        return 0
    spread = difference.standard_error * math.sqrt(difference.units)

    def wide(units: int) -> bool:
        return half_width(spread / math.sqrt(units), units, alpha, tuned_at) > target

    low, high = difference.units, 2 * difference.units
    while wide(high) and high < 10**12:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wide(middle) else (low, middle)
    return high - difference.units
