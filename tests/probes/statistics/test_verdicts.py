"""What is called working: rarely what is drawn at random, nearly always what was planted."""

from __future__ import annotations

import math

import torch

from probes.statistics.paired import against_draws
from probes.statistics.verdict import verdict

ITEMS, SEEDS = 64, 200


class World:
    """Figures of arms as an evaluation measures them: each item has a level, and directions differ in their effect."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.base = torch.randn(ITEMS, generator=self.generator)

    def arm(self, effect: float, spread: float = 0.0, noise: float = 0.3) -> torch.Tensor:
        """Figures [items] of an arm whose effect is `effect`, plus a draw with this spread."""
        drawn = spread * torch.randn(1, generator=self.generator)
        return self.base + effect + drawn + noise * torch.randn(ITEMS, generator=self.generator)

    def controls(self, subject: torch.Tensor, orthogonal: float = 0.0) -> dict[str, torch.Tensor]:
        return {
            "base": self.base[None],
            "negation": (2 * self.base - subject)[None],
            "shuffled": torch.stack([self.arm(0, 0.1) for _ in range(4)]),
            "random": torch.stack([self.arm(0, 0.1) for _ in range(8)]),
            "orthogonal": torch.stack([self.arm(orthogonal, 0.1) for _ in range(4)]),
        }


def works(effect: float, spread: float, orthogonal: float = 0.0) -> float:
    """The share of seeds in which such a subject is called working."""
    outcomes = []
    for seed in range(SEEDS):
        world = World(seed)
        subject = world.arm(effect, spread)
        outcomes.append(verdict(subject, world.controls(subject, orthogonal), seed=seed).outcome)
    return outcomes.count("works") / SEEDS


def test_a_random_vector_is_called_working_in_at_most_one_of_twenty_seeds() -> None:
    assert works(effect=0.0, spread=0.1) <= 0.05


def test_a_vector_that_does_no_more_than_its_orthogonal_perturbation_is_not_called_working() -> None:
    assert works(effect=0.8, spread=0.1, orthogonal=0.8) <= 0.05


def test_a_planted_effect_of_eight_spreads_is_called_working() -> None:
    assert works(effect=0.8, spread=0.0) >= 0.95


def beats_draws(effect: float) -> float:
    """The share of seeds in which a subject beats 16 draws that differ by the noise of their items alone, whose means
    lie 0.3 / 8 apart."""
    hits = []
    for seed in range(SEEDS):
        world = World(seed)
        draws = torch.stack([world.arm(0) for _ in range(16)])
        hits.append(against_draws(world.arm(effect), draws, seed=seed))
    return sum(each.p < 0.05 and each.mean > 0 for each in hits) / SEEDS


def test_the_noise_of_the_items_counts_once_against_draws() -> None:
    """It stands in how far the draws lie apart on these items; counted again in the subject's, it would hide an effect
    of four spreads in one of five seeds."""
    assert beats_draws(0.0) <= 0.05
    assert beats_draws(4 * 0.3 / 8) >= 0.9


def test_the_detectable_difference_is_at_the_level_that_holms_correction_asks_for() -> None:
    """5 % from the draws, which lie apart, and half of that from the base."""
    world = World(0)
    subject = world.arm(0.1)
    draws = torch.stack([world.arm(0, 0.3) for _ in range(4)])
    base, drawn = verdict(subject, {"base": world.base[None], "random": draws}).against
    assert drawn.detectable == against_draws(subject, draws).detectable
    assert base.detectable == against_draws(subject, world.base[None], confidence=0.975).detectable
    assert drawn.detectable > 3 * base.detectable > 3 * base.difference.detectable


def test_under_thirty_items_there_is_no_verdict() -> None:
    subject = torch.ones(29) + 0.1 * torch.randn(29, generator=torch.Generator().manual_seed(0))
    found = verdict(subject, {"base": torch.zeros(1, 29)})
    assert found.outcome == "too few items"
    assert found.reason == "there are only 29 items; a verdict takes at least 30"
    assert found.against[0].difference.mean > 0.9


def test_few_groups_give_no_verdict() -> None:
    found = verdict(torch.ones(60), {"base": torch.zeros(1, 60)}, [str(i % 3) for i in range(60)])
    assert found.outcome == "too few items"
    assert found.reason == "the items belong to 3 groups; a verdict takes at least 8"
    assert [each.beaten for each in found.against] == [None]


def test_an_effect_in_the_wrong_direction_does_not_work() -> None:
    world = World(0)
    found = verdict(world.arm(-1.0), {"base": world.base[None]})
    assert found.outcome == "does not work"
    assert "base" in found.reason


def test_a_subject_that_changes_nothing_does_not_work() -> None:
    world = World(0)
    base = world.base
    found = verdict(base, {"base": base[None]})
    assert found.outcome == "does not work"
    assert math.isnan(found.against[0].detectable)
    drawn = torch.stack([world.arm(0, 0.3) for _ in range(4)])
    _, random = verdict(base, {"base": base[None], "random": drawn}).against
    assert random.detectable == against_draws(base, drawn).detectable > 0


def test_a_subject_without_controls_has_no_verdict_that_it_works() -> None:
    assert verdict(torch.ones(40), {}).outcome == "does not work"
