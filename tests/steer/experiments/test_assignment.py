"""Who gets which arm: frozen vectors, binomial error, a ramp that moves nobody, independent experiments."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import trials
from hypothesis import given

from steer.experiments.assignment import assign, fraction, hashed
from steer.experiments.specification import Arm, Experiment, Metric, Namespace
from vectors.storage.files import canonical_json


def experiment(weights: tuple[float, ...] = (0.5, 0.5), salt: str = "tone-0123456789", **more: object) -> Experiment:
    arms = tuple(Arm(f"arm{i}", weight, "warm" if i else "") for i, weight in enumerate(weights))
    return Experiment("tone", arms, Metric("thumbs"), salt, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        # sha256 of the canonical JSON list, its first 53 bits over 2**53: these never change.
        (("arm", "tone", "ann"), 0.5971910403025524),
        (("coverage", "tone", "ann"), 0.052069161444965095),
        (("namespace", "chat", "ann"), 0.07236845077139265),
        (("arm", "tone", ""), 0.10952044101442493),
        (("arm", "tone", 'Zoë \N{SNOWMAN} \x00\n"'), 0.8955078022105111),
        (("arm", "tonea", "nn"), 0.5915646240956117),
        (("arm", "tone", "\ud800"), 0.2154481401874384),
    ],
)
def test_a_fraction_is_the_same_on_every_machine(parts: tuple[str, ...], value: float) -> None:
    assert fraction(*parts) == value


def test_arms_of_known_units_never_change() -> None:
    arms = "".join(assign(experiment((0.2, 0.3, 0.5)), f"unit-{i}", 1.0).arm[-1] for i in range(60))
    assert arms == "201222112212022222221220121120021220222220100201102222221010"


@given(st.lists(st.text(st.characters(codec=None)), min_size=1, max_size=4))  # halves of characters too
def test_hashes_are_those_of_the_canonical_json_of_a_list(parts: list[str]) -> None:
    digest = hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).digest()
    assert fraction(*parts) == (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    text = canonical_json(["unit", parts[0], parts[-1]]).encode("utf-8", "surrogatepass")
    assert hashed(parts[0], parts[-1]) == hashlib.sha256(text).hexdigest()[:32]


def test_where_one_part_ends_matters() -> None:
    assert fraction("arm", "ab", "c") != fraction("arm", "a", "bc")


@pytest.mark.slow
def test_shares_are_within_binomial_error_over_a_million_units() -> None:
    weights, count = (0.1, 0.2, 0.7), 1_000_000
    these = experiment(weights)
    arms = [assign(these, str(i), 0.5) for i in range(count)]
    assigned = [arm.arm for arm in arms if arm.reason == "assigned"]
    assert abs(len(assigned) - count * 0.5) < 4 * math.sqrt(count * 0.25)
    for i, weight in enumerate(weights):
        share, error = assigned.count(f"arm{i}") / len(assigned), math.sqrt(weight * (1 - weight) / len(assigned))
        assert abs(share - weight) < 4 * error


def test_a_growing_coverage_moves_nobody() -> None:
    these, units = experiment((0.3, 0.7)), [f"unit-{i}" for i in range(20_000)]
    small = {unit: assign(these, unit, 0.1) for unit in units}
    large = {unit: assign(these, unit, 0.5) for unit in units}
    inside = [unit for unit in units if small[unit].reason == "assigned"]
    assert abs(len(inside) - 2000) < 200
    assert all(large[unit] == small[unit] for unit in inside)
    assert sum(arm.reason == "assigned" for arm in large.values()) > 9000


def test_two_experiments_are_independent() -> None:
    first, second = experiment(salt="one"), experiment(salt="two")
    table = np.zeros((2, 2))
    for i in range(40_000):
        table[int(assign(first, str(i), 1.0).arm[-1]), int(assign(second, str(i), 1.0).arm[-1])] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 10.83  # chi-square with one degree of freedom, p = 0.001


def test_coverage_and_arm_are_independent() -> None:
    these = experiment()
    arms = [assign(these, str(i), 0.2).arm for i in range(40_000) if assign(these, str(i), 0.2).reason == "assigned"]
    assert abs(arms.count("arm0") / len(arms) - 0.5) < 4 * 0.5 / math.sqrt(len(arms))


def test_experiments_of_one_namespace_share_no_unit() -> None:
    first = experiment(salt="one", namespace=Namespace("chat", 0, 0.5))
    second = experiment(salt="two", namespace=Namespace("chat", 0.5, 1))
    reasons = [(assign(first, str(i), 1.0).reason, assign(second, str(i), 1.0).reason) for i in range(4000)]
    assert set(reasons) == {("assigned", "outside"), ("outside", "assigned")}


def test_those_outside_get_the_control() -> None:
    assert {assign(experiment((0.0, 1.0)), str(i), 0.0) for i in range(100)} == {("arm0", "outside")}


def test_an_arm_without_weight_gets_nobody() -> None:
    assert {assign(experiment((0.5, 0.0, 0.5)), str(i), 1.0).arm for i in range(2000)} == {"arm0", "arm2"}


def test_hashes_of_units_depend_on_the_salt(tmp_path: Path) -> None:
    first, second = experiment(salt="one"), experiment(salt="two")
    assert hashed(first.salt, "ann") != hashed(second.salt, "ann")
    assert hashed(first.salt, "ann") != hashed(first.salt, "ann", "conversation")
    assert "ann" not in hashed(first.salt, "ann")
    assert trials.experiment(tmp_path).control.plain
