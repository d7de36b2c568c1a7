"""Control arms: replaced directions of the same length, and equal cost by a secant search."""

from __future__ import annotations

import math

import planted
import pytest
import torch

from probes.controls import covariance_direction
from probes.data.reading import read
from probes.directions.shuffled import shuffled_directions
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.controls import (
    acting_layers,
    donor_arm,
    negation,
    orthogonal_arms,
    random_arms,
    shuffled_arms,
)  # fmt: skip
from steer.evaluation.measuring.divergences import measure_divergences, neutral_text, summary
from steer.evaluation.measuring.equal_divergence import at_divergence
from vectors.errors import ArtifactError
from vectors.expression import parse
from vectors.steering import SteeringVector

HIDDEN = 32


def subject(expression: str = "2*v - 0.5*w[3]") -> Arm:
    generator = torch.Generator().manual_seed(0)
    v = SteeringVector({i: torch.randn(HIDDEN, generator=generator) for i in (1, 2)}, {"apply": [2]})
    w = SteeringVector({3: torch.randn(HIDDEN, generator=generator)})
    return Arm("s", composition=parse(expression), vectors={"v": v, "w": w})


def states() -> dict[int, torch.Tensor]:
    return {i: torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in (2, 3)}


def test_random_directions_have_the_covariance_of_the_states() -> None:
    scales = torch.linspace(0, 3, HIDDEN)
    rows = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(5)) * scales + 7
    drawn = torch.stack([covariance_direction(rows, seed) for seed in range(400)])
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400).double())
    wanted = (scales.square() / scales.square().sum()).double()
    torch.testing.assert_close(drawn.square().mean(0), wanted, rtol=0, atol=0.03)
    assert float(drawn.mean(0).norm()) < 0.15


def test_control_vectors_have_the_length_of_those_they_replace_where_they_act() -> None:
    arm = subject()
    assert acting_layers(arm) == [2, 3]
    for control in [*random_arms(arm, states(), 2, 0), *orthogonal_arms(arm, states(), 2, 0)]:
        assert control.composition == arm.composition
        for name, layer in (("v", 2), ("w", 3)):
            norm = control.vectors[name].layers[layer].norm()
            torch.testing.assert_close(norm, arm.vectors[name].layers[layer].norm())
        assert list(control.vectors["v"].layers) == [2]
    first, second = random_arms(arm, states(), 2, 0)
    assert not torch.equal(first.vectors["v"].layers[2], second.vectors["v"].layers[2])


def test_orthogonal_directions_are_orthogonal() -> None:
    arm = subject()
    for control in orthogonal_arms(arm, states(), 3, 0):
        for name, layer in (("v", 2), ("w", 3)):
            a, b = control.vectors[name].layers[layer], arm.vectors[name].layers[layer]
            assert abs(float(a @ b)) < 1e-4 * float(a.norm() * b.norm())


def test_a_control_of_several_layers_adds_up_as_its_subject_does() -> None:
    """Five equal unit directions add up to 5; drawn apart at each layer they came to the root of 5."""
    generator = torch.Generator().manual_seed(4)
    stream = (
        torch.randn(6, 50, HIDDEN, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 1])[:, None, None]
    ).cumsum(0)
    direction = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
    vector = SteeringVector(dict.fromkeys(range(1, 6), direction), {"apply": [1, 2, 3, 4, 5]})
    arm = Arm("s", composition=parse("v"), vectors={"v": vector})
    layers = {i: stream[i] for i in range(1, 6)}
    for control in [*random_arms(arm, layers, 4, 0), *orthogonal_arms(arm, layers, 4, 0)]:
        directions = torch.stack([*control.vectors["v"].layers.values()])
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(5))
        assert float(directions.sum(0).norm()) > 4


def alike(expression: str) -> Arm:
    """Two vectors at one layer, of which one is nearly the other."""
    generator = torch.Generator().manual_seed(6)
    v, other = torch.randn(2, HIDDEN, generator=generator)
    vectors = {"v": SteeringVector({2: v}), "w": SteeringVector({2: 2 * v + 0.5 * other})}
    return Arm("s", composition=parse(expression), vectors=vectors)


def at_layer_2(arm: Arm) -> torch.Tensor:
    return torch.stack([arm.vectors[name].layers[2] for name in ("v", "w")])


@pytest.mark.parametrize(("expression", "weights"), [("v + w", (1.0, 1.0)), ("2*v - w", (2.0, -1.0))])
def test_a_control_of_several_vectors_adds_up_as_its_subject_does(
    expression: str, weights: tuple[float, float]
) -> None:
    """Also a difference of them, which was nothing where one direction replaced both."""
    arm = alike(expression)
    extracted = [{2: row} for row in torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(7))]
    shuffled = shuffled_arms(arm, extracted)
    assert [each.name for each in shuffled] == ["s: shuffled 1", "s: shuffled 2"]
    drawn = [*random_arms(arm, states(), 2, 0), *orthogonal_arms(arm, states(), 2, 0), *shuffled]
    originals = at_layer_2(arm)
    for control in drawn:
        torch.testing.assert_close(at_layer_2(control) @ at_layer_2(control).T, originals @ originals.T)
    donor = SteeringVector({2: torch.ones(HIDDEN)})
    total = torch.tensor(weights) @ originals
    for control in [*drawn, donor_arm(arm, donor, "other")]:
        torch.testing.assert_close((torch.tensor(weights) @ at_layer_2(control)).norm(), total.norm())
    for control in orthogonal_arms(arm, states(), 2, 0):
        assert float((at_layer_2(control) @ originals.T).abs().max()) < 1e-4 * float(total.norm() ** 2)


def test_what_is_nothing_stays_nothing() -> None:
    zero = SteeringVector({2: torch.zeros(HIDDEN)})
    arm = Arm("s", composition=parse("v + w"), vectors={"v": alike("v").vectors["v"], "w": zero})
    for control in [*random_arms(arm, states(), 1, 0), *shuffled_arms(arm, [{2: torch.zeros(HIDDEN)}] * 2)]:
        assert not control.vectors["w"].layers[2].any()
    assert not shuffled_arms(arm, [{2: torch.zeros(HIDDEN)}] * 2)[0].vectors["v"].layers[2].any()


def test_a_draw_does_not_depend_on_how_many_there_are() -> None:
    arm = subject()
    assert torch.equal(
        random_arms(arm, states(), 1, 0)[0].vectors["v"].layers[2],
        random_arms(arm, states(), 5, 0)[0].vectors["v"].layers[2],
    )


def test_the_negation_has_the_opposite_sign_and_a_clamp_has_none() -> None:
    negated = negation(subject())
    assert negated is not None
    assert str(negated.composition) == "-2*v + 0.5*w[3]"
    assert negation(subject("clamp(v, 1)")) is None


def test_a_donor_acts_at_the_same_layers_at_the_same_length() -> None:
    arm = subject("v")
    donor = SteeringVector({2: 9 * torch.ones(HIDDEN), 3: torch.ones(HIDDEN)})
    replaced = donor_arm(arm, donor, "other").vectors["v"].layers[2]
    torch.testing.assert_close(replaced, torch.ones(HIDDEN) / math.sqrt(HIDDEN) * arm.vectors["v"].layers[2].norm())
    with pytest.raises(ArtifactError, match="holds no layer 2"):
        donor_arm(arm, SteeringVector({1: torch.ones(HIDDEN)}), "other")


def test_shuffled_labels_give_directions_from_the_same_texts_without_the_behaviour() -> None:
    loaded = planted.loaded(planted.transparent_model())
    words = [f"word {i} aa" for i in range(20)], [f"word {i} zz" for i in range(20)]
    contrast = read(*words)
    drawn = shuffled_directions(loaded, contrast, [1, 2], count=3, seed=0)
    from probes.directions.extraction import extract

    true = extract(loaded, contrast, layers="1,2").vector.layers
    for each in drawn:
        assert float(each[1].norm()) < 0.5 * float(true[1].norm())
    arm = Arm("s", composition=parse("v"), vectors={"v": SteeringVector(true, {"apply": [1]})})
    control = shuffled_arms(arm, drawn)[0]
    torch.testing.assert_close(control.vectors["v"].layers[1].norm(), true[1].norm())


def test_the_secant_search_finds_arms_of_equal_divergence() -> None:
    loaded = planted.loaded(planted.transparent_model())
    neutral = neutral_text(loaded, ["How are you?", "What is it?", "Why?"], tokens=8)
    generator = torch.Generator().manual_seed(1)
    drawn = [SteeringVector({1: length * torch.randn(HIDDEN, generator=generator)}) for length in (0.05, 0.3, 0.01)]
    arms = [Arm(f"a{i}", composition=parse("v"), vectors={"v": vector}) for i, vector in enumerate(drawn)]

    def measure(scaled: object) -> list[torch.Tensor]:
        return measure_divergences(loaded, neutral, scaled)  # type: ignore[arg-type]

    for arm, factor in at_divergence(arms, 0.05, measure):
        assert factor > 0
        assert summary(measure([arm])[0]).p95 == pytest.approx(0.05, rel=0.12)
    assert [factor for _, factor in at_divergence(arms, 0.0, measure)] == [0, 0, 0]
