"""What votes say: win rates of pairs of arms, and with more than two arms one strength for each (Bradley and Terry)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from probes.seeds import child_seed
from steer.experiments.paired.votes import Vote
from steer.experiments.statistics.bounds import wilson

RESAMPLES = 1000
ALPHA = 0.05


class Pairing(NamedTuple):
    """The votes between two arms; `rate` is the share that the second one won, ties counted half.

    The interval is Wilson's; rate and interval are None without a decided vote. `abstained` votes changed with the
    order of the sides; `missing` have no decision.
    """

    first: str
    second: str
    first_won: int
    second_won: int
    ties: int
    abstained: int
    missing: int
    rate: float | None
    low: float | None
    high: float | None

    @property
    def decided(self) -> int:
        """The votes that count."""
        return self.first_won + self.second_won + self.ties


class Strength(NamedTuple):
    """An arm's log-odds of being preferred to the control, with the interval of the bootstrap over prompts."""

    arm: str
    strength: float
    low: float
    high: float


def pairings(arms: Sequence[str], votes: Sequence[Vote], alpha: float = ALPHA) -> list[Pairing]:
    """Every pair of arms that was voted on, in the order of the arms."""
    found = []
    for first, second in itertools.combinations(arms, 2):
        listed = [vote for vote in votes if (vote.first, vote.second) == (first, second)]
        if not listed:
            continue
        counts = Counter(vote.winner for vote in listed)
        decided = counts[1] + counts[-1] + counts[0]
        won = counts[-1] + counts[0] / 2
        abstained = sum(vote.winner is None and vote.reason == "order" for vote in listed)
        found.append(
            Pairing(
                first, second, counts[1], counts[-1], counts[0], abstained, counts[None] - abstained,
                won / decided if decided else None,
                *(wilson(won, decided, alpha) if decided else (None, None)),
            )
        )  # fmt: skip
    return found


def strengths(
    arms: Sequence[str], votes: Sequence[Vote], *, seed: int = 0, alpha: float = ALPHA, resamples: int = RESAMPLES
) -> list[Strength]:
    """The strengths of all arms but the first, the control, whose strength is 0; of a model with ties as half a win.

    P(i beats j) = s_i / (s_i + s_j) (Bradley and Terry 1952); what is given is ln(s_i / s_control). Whole prompts are
    resampled, since the votes of a prompt share its answers. One tie of every pair is added, so that an arm that wins
    every vote has a finite strength. Empty without a decided vote. Needs the extra `ab`.
    """
    decided = [vote for vote in votes if vote.winner is not None]
    if not decided:
        return []
    import evalica
    import numpy as np

    extra = list(itertools.combinations(arms, 2))
    first = [*(vote.first for vote in decided), *(a for a, _ in extra)]
    second = [*(vote.second for vote in decided), *(b for _, b in extra)]
    named = {1: evalica.Winner.X, -1: evalica.Winner.Y, 0: evalica.Winner.Draw}
    winners = [*(named[vote.winner or 0] for vote in decided), *(evalica.Winner.Draw for _ in extra)]
    prompts = sorted({vote.prompt for vote in decided})
    place = {prompt: i for i, prompt in enumerate(prompts)}
    of_vote = np.array([place[vote.prompt] for vote in decided])

    def fitted(counts: np.ndarray) -> list[float]:
        weights = [*counts[of_vote].tolist(), *(1.0 for _ in extra)]
        scores = evalica.bradley_terry(first, second, winners, weights=weights).scores
        return [math.log(float(scores[arm])) - math.log(float(scores[arms[0]])) for arm in arms[1:]]

    estimate = fitted(np.ones(len(prompts)))
    generator = np.random.default_rng(child_seed(seed, "votes"))
    drawn = [
        fitted(np.bincount(generator.integers(len(prompts), size=len(prompts)), minlength=len(prompts)).astype(float))
        for _ in range(resamples)
    ]
    ends = np.quantile(np.array(drawn), [alpha / 2, 1 - alpha / 2], axis=0)
    return [Strength(arm, estimate[i], float(ends[0][i]), float(ends[1][i])) for i, arm in enumerate(arms[1:])]
