"""A calibration: strengths within a budget, and the layer that then moves the held-out margin most."""

from __future__ import annotations

import itertools

import pico
import planted
import pytest
import torch

from probes.arms.neutral import continuations, summary
from probes.arms.scores import Completions, TokenScores
from probes.directions import calibration
from probes.directions.calibration import Contrasted, calibrate, margin
from probes.generation import generate
from probes.interventions import steering
from probes.models.completions import Completion
from probes.models.tokens import rendered
from probes.scores.repetition import repetition

WANTED, UNWANTED = [40, 41, 42], [50, 51, 52]


def examples() -> Contrasted:
    return Contrasted(
        [Completion([1, 7, 8 + i], [token]) for i, token in enumerate(WANTED)],
        [Completion([1, 7, 8 + i], [token]) for i, token in enumerate(UNWANTED)],
    )


def test_the_planted_layer_is_chosen_and_its_strength_costs_what_the_budget_allows() -> None:
    model = planted.transparent_model()
    loaded = planted.loaded(model)
    good = planted.towards(model, WANTED, UNWANTED).layers[1]
    idle = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(1))
    directions = {0: idle, 2: good, 3: -good}
    found = calibrate(loaded, directions, directions, examples(), dict.fromkeys(directions, 1.0), budget=0.2)
    assert found.chosen.layer == 2
    assert found.chosen.steady
    assert found.chosen.effect > max(each.effect for each in found.points if each.layer != 2)
    assert not next(each for each in found.points if each.layer == 3).steady
    assert all(0 < each.p95 <= 0.2 for each in found.points)
    # Measured again, with the definition that every command uses.
    neutral = continuations(loaded, calibration.neutral_prompts(), tokens=calibration.TOKENS)
    (again,) = Completions(model, neutral, divergence=True).scores([{2: found.points[1].strength * good}])
    assert summary(torch.cat(again.divergences)).p95 == pytest.approx(found.points[1].p95, abs=1e-6)


@pytest.mark.parametrize(
    ("shares", "strength", "calls"),
    [
        ([0.15, 0.5, 0.5], 1.0, 1),
        ([0.5, 0.3, 0.15], 0.49, 1),
        ([0.5, 0.5, 0.5, 0.16, 0.5], 0.343, 2),
        ([0.5, 0.5, 0.5, 0.5, 0.4], 0.24, 2),  # as low as it gets
    ],
)
def test_the_strength_is_lowered_until_the_text_no_longer_repeats_itself(
    shares: list[float], strength: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planted.transparent_model()
    good = planted.towards(model, WANTED, UNWANTED).layers[1]
    measured: list[list[float]] = []  # of each call, the lengths of its directions

    def repetitions(_: object, directions: list[dict[int, torch.Tensor] | None]) -> list[float]:
        lengths = [0.0 if each is None else float(each[1].norm()) for each in directions]
        before = sum(map(len, measured))
        measured.append(lengths)
        return [0.1, *shares][before : before + len(lengths)]

    monkeypatch.setattr(calibration, "repetitions", repetitions)
    found = calibrate(planted.loaded(model), {1: good}, {}, Contrasted([], []), {1: 1.0})
    assert len(measured) == calls
    unsteered, *lengths = itertools.chain(*measured)
    chosen = lengths.index(pytest.approx(found.chosen.strength * float(good.norm()), rel=1e-4))
    assert (unsteered, found.repeated_base, found.repeated) == (0.0, 0.1, shares[chosen])
    assert found.chosen.strength == pytest.approx(strength * found.points[0].strength, rel=0.1)
    assert found.points[0].effect == 0.0


@pytest.mark.parametrize(("yes", "no"), [(20, 8), (5, 30)])
def test_a_preference_for_an_answer_moves_no_margin(yes: int, no: int) -> None:
    """Of `yes` examples "yes" is the positive completion, of `no` the negative one; all are likelier by 0.3 and 0.1."""

    def answers(first: int, second: int) -> list[Completion]:
        return [Completion([1], [4])] * first + [Completion([1], [5])] * second

    def likelihoods(preference: float) -> TokenScores:
        likely = {(4, True): 0.3 + preference, (5, True): 0.3, (4, False): 0.1 + preference, (5, False): 0.1}
        values = [
            torch.tensor([likely[each.completion_ids[0], side]]) for side in (True, False) for each in sides[side]
        ]
        return TokenScores(values, [])

    sides = {True: answers(yes, no), False: answers(no, yes)}
    examples = Contrasted(sides[True], sides[False])
    assert margin(likelihoods(0.0), examples) == pytest.approx(0.2)
    assert margin(likelihoods(2.0), examples) == pytest.approx(0.2)
    # Free text is averaged as it stands.
    free = Contrasted([Completion([1], [i]) for i in range(yes + no)], examples.negative)
    values = torch.cat(likelihoods(2.0).log_likelihoods)
    difference = values[: yes + no].mean() - values[yes + no :].mean()
    assert margin(likelihoods(2.0), free) == pytest.approx(float(difference))


def test_texts_of_several_directions_share_a_batch_and_repeat_as_much_as_each_alone() -> None:
    loaded = planted.loaded(planted.transparent_model())
    direction = planted.towards(loaded.model, WANTED, UNWANTED).layers[1]
    directions = [None, {1: 8.0 * direction}, {1: -8.0 * direction}]
    together = calibration.repetitions(loaded, directions)
    assert together == [calibration.repetitions(loaded, [each])[0] for each in directions]
    ids = rendered(calibration.neutral_prompts(), loaded.tokenizer)
    texts = generate(
        loaded.model, loaded.tokenizer, ids, steering(loaded.model, directions[1]), max_tokens=calibration.TEXT_TOKENS
    )
    assert together[1] == sum(repetition(each.completion_ids) for each in texts) / len(texts)
