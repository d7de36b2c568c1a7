"""What the serving benchmark computes from what it measures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_process import random_probes

from bench import serving
from steer.serving.engine.bounds import TERMS
from steer.serving.engine.phases import size
from steer.serving.settings import Settings
from vectors.expression import parse
from vectors.fit import problems_of_conditions
from vectors.probe import Probe
from vectors.steering import SteeringVector


def test_a_ratio_that_never_varies_has_no_spread() -> None:
    assert serving.interval([0.98] * 5) == pytest.approx((0.98, 0.98, 0.98))


def test_the_interval_holds_the_mean_and_narrows_with_more_rounds() -> None:
    chosen = random.Random(1)
    few, many = ([chosen.gauss(1, 0.05) for _ in range(n)] for n in (6, 200))
    for ratios in (few, many):
        mean, low, high = serving.interval(ratios)
        assert low < mean < high
    assert serving.interval(many)[2] - serving.interval(many)[1] < serving.interval(few)[2] - serving.interval(few)[1]


def test_each_round_runs_every_contestant_once_on_the_same_prompts_and_the_first_does_not_count() -> None:
    seen: list[tuple[str, int]] = []

    def contestant(name: str) -> serving.Seconds:
        return 1.0, 2.0, 3.0

    def run(name: str):  # type: ignore[no-untyped-def]
        return lambda ids: (seen.append((name, ids[0][0])), contestant(name))[1]

    numbers = iter(range(100))
    found = serving.interleaved({name: run(name) for name in "abc"}, 3, lambda: [[next(numbers)]], random.Random(0))
    assert found == {name: [(1.0, 2.0, 3.0)] * 3 for name in "abc"}
    for i in range(4):
        assert sorted(seen[3 * i : 3 * i + 3]) == [("a", i), ("b", i), ("c", i)]
    assert len({tuple(name for name, _ in seen[3 * i : 3 * i + 3]) for i in range(4)}) > 1, "in another order"


def test_compositions_are_all_different_and_what_they_should_be() -> None:
    threes, fours = [parse(serving.three()) for _ in range(50)], [parse(serving.four()) for _ in range(50)]
    assert len({composition.digest for composition in [*threes, *fours]}) == 100
    assert {len(composition.names) for composition in threes} == {3}
    assert all(sum(term.operation != "add" for term in composition.terms) == 4 for composition in fours)


def test_gated_compositions_are_all_different_and_can_be_decided(tmp_path: Path) -> None:
    compositions = [parse(serving.gated(kind)) for kind in ("when", "while") for _ in range(20)]
    assert len({composition.digest for composition in compositions}) == 40
    probe = Probe.load(random_probes(tmp_path, serving.HIDDEN, {"anger": serving.READ})["anger"])
    vectors = {name: SteeringVector({i: torch.ones(serving.HIDDEN) for i in range(30)}) for name in serving.NAMES}
    for composition in compositions:
        assert problems_of_conditions(composition, vectors, {"anger": probe}) == []
        assert len(composition.conditions) == 1
        assert all(term.conditions for term in composition.terms)


def test_the_worst_compositions_are_as_large_as_a_server_allows_and_always_new() -> None:
    settings = Settings()
    phased, termed = ([parse(make()) for _ in range(3)] for make in (serving.phased, serving.termed))
    assert len({composition.digest for composition in [*phased, *termed]}) == 6
    for composition in phased:
        slots, terms = size(composition)
        assert slots == settings.phases
        assert terms <= TERMS * settings.phases
        assert {term.name for term in composition.terms} == set(serving.NAMES)
        assert all(term.operation == "clamp" for term in composition.terms)
    assert {len(composition.terms) for composition in termed} == {TERMS * settings.phases}


def test_a_ratio_above_one_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"ours": [(1.0, 2.0, 3.0)] * 4, "stock": [(2.0, 2.0, 6.0)] * 4}
    found = serving.report("title", seconds, [("ours", "stock")], 100)
    assert found["ratios"]["ours / stock, clock"] == pytest.approx((2, 2, 2))
    assert found["ratios"]["ours / stock, processor"] == pytest.approx((1, 1, 1))
    assert found["ratios"]["ours / stock, fastest step"] == pytest.approx((2, 2, 2))
    assert "100.0 tokens/s" in capsys.readouterr().out
