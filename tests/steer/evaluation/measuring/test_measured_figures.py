"""The figures of arms on items, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import planted
import pytest
import torch

from probes.data.examples import Example
from probes.generation import generate
from probes.models.loading import LoadedModel
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.subjects import subjects_of
from steer.evaluation.measuring import generations
from steer.evaluation.measuring.divergences import Neutral, measure_divergences, neutral_text, summary
from steer.evaluation.measuring.engine import Hooks, measured_once
from steer.evaluation.measuring.figures import intervention, measure_arms
from steer.evaluation.measuring.rendering import answers_of, rendered_items
from steer.evaluation.suites.items import Choice, Item, Pair
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return planted.loaded(planted.transparent_model())


@pytest.fixture(scope="module")
def vector(loaded: LoadedModel) -> SteeringVector:
    return planted.towards(loaded.model, [10, 11], [20, 21])


ITEMS: list[Item] = [
    Pair(Example("a kind word", "Say it."), Example("cold", "Say it."), id="1"),
    Pair(Example("some plain text"), Example("another, longer plain text"), id="2"),
    Choice("Is it so?", ("yes", "no"), 0, letters=False, id="3"),
    Choice("Which?", ("the first", "the second", "the third"), 2, id="4"),
]


def arms_of(vector: SteeringVector) -> list[Arm]:
    compositions = [parse("v"), parse("2*v"), parse("-0.5*v")]
    return [
        Arm("base"),
        *(Arm(str(c), composition=c, vectors={"v": vector}) for c in compositions),
        Arm("prompted", system="Be kind."),
    ]


def test_the_divergence_of_an_arm_is_measured_once_however_often_it_is_wanted(
    loaded: LoadedModel, vector: SteeringVector
) -> None:
    class Counting(Hooks):
        measured = 0

        def measure_divergences(self, neutral: Neutral, arms: Sequence[Arm]) -> list[torch.Tensor]:
            self.measured += len(arms)
            return super().measure_divergences(neutral, arms)

    engine, neutral = Counting(loaded), neutral_text(loaded, ["Say something."], tokens=6)
    arms = arms_of(vector)
    measure = measured_once(engine, neutral)
    other = SteeringVector({1: -vector.layers[1]}, dict(vector.metadata))
    for wanted in (arms, [*arms[::-1], arms[1].scaled(2.0, "twice"), replace(arms[1], vectors={"v": other})]):
        for one, direct in zip(measure(wanted), measure_divergences(loaded, neutral, wanted), strict=True):
            torch.testing.assert_close(one, direct)
    assert engine.measured == len(arms) + 1


def test_the_figure_of_a_pair_is_the_margin_of_its_likelihoods_per_token(
    loaded: LoadedModel, vector: SteeringVector
) -> None:
    figures = measure_arms(loaded, ITEMS, arms_of(vector))
    rendered = rendered_items(ITEMS, loaded.tokenizer, None)
    for row, strength in enumerate((0.0, 1.0, 2.0, -0.5)):
        for column in (0, 1):
            per_token = [
                planted.log_likelihood(
                    loaded.model, list(c.prompt_ids), list(c.completion_ids), vector.layers[1], strength
                )
                / len(c.completion_ids)
                for c in rendered[column].completions
            ]
            assert float(figures[row, column]) == pytest.approx(per_token[0] - per_token[1], abs=1e-5)


def test_the_figure_of_a_choice_is_its_log_odds_over_both_orders(loaded: LoadedModel, vector: SteeringVector) -> None:
    figures = measure_arms(loaded, ITEMS, arms_of(vector))
    completions = rendered_items(ITEMS, loaded.tokenizer, None)[3].completions
    for row, strength in enumerate((0.0, 1.0, 2.0)):
        likelihoods = [
            planted.log_likelihood(loaded.model, list(c.prompt_ids), list(c.completion_ids), vector.layers[1], strength)
            for c in completions
        ]
        first, second = likelihoods[:3], likelihoods[3:]
        odds = [each[2] - math.log(math.exp(each[0]) + math.exp(each[1])) for each in (first, second)]
        assert float(figures[row, 3]) == pytest.approx(sum(odds) / 2, abs=1e-5)


def test_both_orders_of_the_options_are_asked_and_the_letters_follow_the_options() -> None:
    answers = answers_of(Choice("Which?", ("red", "blue"), 1))
    assert [answer.context for answer in answers[:2]] == ["Which?\n\nChoices:\n(A) red\n(B) blue"] * 2
    assert [answer.context for answer in answers[2:]] == ["Which?\n\nChoices:\n(A) blue\n(B) red"] * 2
    assert [answer.completion for answer in answers] == ["(A)", "(B)", "(B)", "(A)"]


def test_a_model_that_prefers_a_letter_has_no_log_odds(loaded: LoadedModel) -> None:
    """In the transparent model an answer depends on its last tokens alone, so both orders cancel."""
    item = Choice("Which?", ("red", "blue"), 1)
    assert float(measure_arms(loaded, [item], [Arm("base")])[0, 0]) == pytest.approx(0, abs=1e-6)


def test_figures_do_not_depend_on_the_order_of_items_or_arms(loaded: LoadedModel, vector: SteeringVector) -> None:
    arms = arms_of(vector)
    figures = measure_arms(loaded, ITEMS, arms)
    backwards = measure_arms(loaded, ITEMS[::-1], arms[::-1])
    torch.testing.assert_close(backwards.flip(0, 1), figures, rtol=0, atol=1e-5)
    alone = torch.cat([measure_arms(loaded, [item], arms) for item in ITEMS], 1)
    torch.testing.assert_close(alone, figures, rtol=0, atol=1e-5)


def test_a_system_prompt_changes_what_stands_before_and_not_what_is_scored(loaded: LoadedModel) -> None:
    plain = rendered_items(ITEMS, loaded.tokenizer, None)
    prompted = rendered_items(ITEMS, loaded.tokenizer, None, "Be kind.")
    for a, b in zip(plain, prompted, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert list(x.completion_ids) == list(y.completion_ids)
            assert "Be kind." in loaded.tokenizer.decode(y.prompt_ids)
            assert "Be kind." not in loaded.tokenizer.decode(x.prompt_ids)


def test_the_divergence_on_neutral_text_is_that_of_the_distributions(
    loaded: LoadedModel, vector: SteeringVector
) -> None:
    neutral = neutral_text(loaded, ["How are you?", "What is it?"], tokens=6)
    arms = arms_of(vector)
    divergences = measure_divergences(loaded, neutral, arms)
    assert summary(divergences[0]).p95 == pytest.approx(0, abs=1e-6)
    expected = []
    for prompt, text in zip(neutral.prompts, neutral.continuations, strict=True):
        rendered = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        ids = [*rendered["input_ids"], *text][:-1]
        start = len(ids) - len(text)
        base = planted.logits(loaded.model, ids).log_softmax(-1)[start:]
        moved = planted.logits(loaded.model, ids, vector.layers[1], 2.0).log_softmax(-1)[start:]
        expected.append((base.exp() * (base - moved)).sum(-1))
    torch.testing.assert_close(divergences[2], torch.cat(expected), rtol=1e-3, atol=1e-6)
    of_two = summary(divergences[2])
    assert of_two.mean == pytest.approx(float(torch.cat(expected).mean()), rel=1e-3)
    assert of_two.rms >= of_two.mean > 0
    assert len(divergences[4]) == len(divergences[0])


def test_a_condition_that_always_holds_is_the_response_and_one_that_never_holds_the_base(
    loaded: LoadedModel, vector: SteeringVector
) -> None:
    vectors = {"v": vector, "on": Probe({0: Readout(torch.zeros(vector.hidden_size), 1.0)})}
    subjects = subjects_of(["v@response", "v@when:on>0", "v@when:on<0"], vectors)
    arms = [Arm("base"), *(subject.arm for subject in subjects)]
    assert list(arms[2].probes) == ["on"]
    base, everywhere, always, never = measure_arms(loaded, ITEMS, arms)
    assert torch.allclose(always, everywhere, rtol=0, atol=1e-5)
    assert torch.allclose(never, base, rtol=0, atol=1e-5)
    assert float((always - never).abs().min()) > 1e-3
    assert torch.equal(everywhere, measure_arms(loaded, ITEMS, arms[:2])[1])  # whatever is measured beside it


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_an_arm_writes_what_it_writes_alone_whatever_arms_share_its_batch(
    loaded: LoadedModel, vector: SteeringVector, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Say something.", "How?", "What is it that you would like to say?"]
    opposite = SteeringVector({1: -vector.layers[1]}, dict(vector.metadata))
    arms = [
        *arms_of(vector),
        Arm("of the same name", composition=parse("2*v"), vectors={"v": opposite}),
        Arm("in the answer", composition=parse("3*v@response"), vectors={"v": vector}, system="Be kind."),
    ]
    monkeypatch.setattr(generations, "BATCH", batch)
    written = generations.generate_arms(loaded, arms, prompts, max_tokens=5)
    assert len({str(each) for each in written.values()}) > 3  # the arms differ
    for arm in arms:
        ids = with_system(prompts, arm.system, loaded.tokenizer)
        alone = [
            generate(loaded.model, loaded.tokenizer, [each], intervention(loaded, arm), max_tokens=5)[0] for each in ids
        ]
        assert [each.ids for each in written[arm.name]] == [list(each.completion_ids) for each in alone]
        assert [each.prompt for each in written[arm.name]] == prompts
