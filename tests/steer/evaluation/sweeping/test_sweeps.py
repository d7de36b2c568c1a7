"""Sweeps over a model whose figures are known: the choice, the budget, what a kill leaves, the learning curve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import torch

import steer
from probes.arms.neutral import continuations, summary
from probes.arms.scores import Completions
from probes.data.examples import Example
from probes.data.reading import Contrast
from probes.models.loading import LoadedModel
from probes.statistics.paired import Difference
from steer.evaluation.arms.controls import acting_layers
from steer.evaluation.arms.subjects import subjects_of
from steer.evaluation.inputs import overlaps
from steer.evaluation.suites.items import Choice, Pair, Suite
from steer.evaluation.suites.sides import with_sides
from steer.evaluation.sweeping import cells as cells_module
from steer.evaluation.sweeping import measured as measured_module
from steer.evaluation.sweeping.api import sweep_examples
from steer.evaluation.sweeping.groups import parse_groups
from steer.evaluation.sweeping.measured import Candidate, Items
from steer.evaluation.sweeping.parts import parts_of
from steer.evaluation.sweeping.record import doubted, recommendation, record_of, why_nothing
from steer.evaluation.sweeping.record import result as record_result
from steer.evaluation.sweeping.request import Settings, Sides, Source, sides_of
from steer.evaluation.sweeping.search import Point, golden
from steer.evaluation.sweeping.sweep import Swept, figures_of_test, sweep, verdict_of
from steer.reports import sweep as page
from vectors.errors import ArtifactError, ExampleError, SteerError, UsageError
from vectors.registry.layers import together
from vectors.steering import SteeringVector

NEUTRAL = ["How are you?", "What is it?", "Why?", "Tell me more."]


def pairs(count: int, prompt: str = "day") -> list[Pair]:
    return [
        Pair(Example(" yes the", f"{prompt} {i}?"), Example(" no cold", f"{prompt} {i}?"), id=f"{prompt}{i}")
        for i in range(count)
    ]


SIDES = Sides(pairs(6), pairs(6, "test"), NEUTRAL, NEUTRAL[::-1])


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return planted.loaded(planted.transparent_model())


@pytest.fixture(scope="module")
def source(loaded: LoadedModel) -> Source:
    """A vector that steers towards the positive completions at layer 2, away from them at 1, and at random at 0."""
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" yes the", " no cold")]
    good = planted.towards(loaded.model, *ids).layers[1]
    directions = {0: torch.randn(len(good), generator=torch.Generator().manual_seed(0)) / 5, 1: -good, 2: good}
    return Source(
        ["given"], [0, 1, 2], lambda method, layers: Candidate(method, layers, {i: directions[i] for i in layers}), {}
    )


@pytest.fixture(scope="module", autouse=True)
def written_once(loaded: LoadedModel) -> Iterator[None]:
    """What the unsteered model writes after the same prompts is generated once: half the time of a sweep here."""
    known: dict[Any, Any] = {}

    def remembered(model: LoadedModel, prompts: Any, *, seed: int, **options: Any) -> Any:
        key = (id(model), *prompts, seed)
        if key not in known:
            known[key] = continuations(model, prompts, seed=seed, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measured_module, "continuations", remembered)
        yield


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, source: Source) -> Swept:
    """The sweep over all layers, from beginning to end."""
    return swept(loaded, source)


def settings(**changes: Any) -> Settings:
    return Settings(**({"layers": "all", "budget": 0.3} | changes))


def swept(loaded: LoadedModel, source: Source, **changes: Any) -> Swept:
    return sweep(loaded, source, SIDES, settings(**changes))


def test_the_planted_layer_is_chosen_within_the_budget_and_moves_test_items_throughout(
    loaded: LoadedModel, whole: Swept
) -> None:
    result = whole
    assert result.chosen is not None
    assert result.chosen.candidate.layers == (2,)
    assert result.test["steady"]
    assert result.test["low"] > 0
    assert result.test["verdict"] == "too few items to say"
    assert result.test["margins"] == sorted(result.test["margins"])
    for prompts, seed in ((SIDES.neutral, 0), (SIDES.check, 1)):  # measured again, by hand
        texts = continuations(loaded, prompts, seed=seed)
        acting = result.chosen.candidate.at(result.chosen.strength)
        (again,) = Completions(loaded.model, texts, divergence=True).scores([acting])
        assert 0 < summary(torch.cat(again.divergences)).p95 <= 0.3


def test_test_items_never_influence_the_choice(loaded: LoadedModel, source: Source, whole: Swept) -> None:
    turned = [pair._replace(positive=pair.negative, negative=pair.positive) for pair in SIDES.test]
    straight, reverse = whole, sweep(loaded, source, SIDES._replace(test=turned), settings())
    assert [point.value() for point in straight.points] == [point.value() for point in reverse.points]
    assert straight.test["effect"] == pytest.approx(-reverse.test["effect"])


@pytest.mark.parametrize("layers", ["0,1,2", "1+2,2", "0..2,2", "auto"])
def test_single_layers_pairs_and_bands_are_compared(loaded: LoadedModel, source: Source, layers: str) -> None:
    result = swept(loaded, source, layers=layers)
    assert result.chosen is not None
    assert 2 in result.chosen.candidate.layers


def test_choices_are_swept_by_their_log_odds_and_not_mixed_with_pairs(loaded: LoadedModel, source: Source) -> None:
    choices = [  # without a space before them, it is "no" that the vector makes likelier
        Choice(f"{side} {i}?", ("yes", "no"), 1, letters=False, id=f"{side}{i}") for side in "ab" for i in range(5)
    ]
    sides = sides_of(choices[:5], choices[5:], NEUTRAL)
    result = sweep(loaded, source, sides, settings(layers="2", strengths=(0.2,)))
    assert result.metric == "log-odds"
    item = Items(loaded, choices[5:])
    base, steered = item.figures([None, source.candidate("given", (2,)).at(0.2)])
    assert result.test["effect"] == pytest.approx(sum(steered) / 5 - sum(base) / 5)
    with pytest.raises(UsageError, match="pairs and choices"):
        sides_of(choices, pairs(3), NEUTRAL)


def test_on_a_grid_the_largest_effect_within_the_budget_is_chosen(loaded: LoadedModel, source: Source) -> None:
    result = swept(loaded, source, layers="2", strengths=(0.1, 0.2, 0.4, 50.0))
    assert [point.strength for point in result.points][:4] == [0.1, 0.2, 0.4, 50.0]
    assert not result.points[3].within
    assert result.chosen is not None
    within = [point for point in result.points if point.within]
    assert result.chosen.strength == max(point.strength for point in within)


@pytest.mark.parametrize("at", [1, 2, 8])
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_numbers(
    loaded: LoadedModel, source: Source, whole: Swept, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, written = cells_module.write_atomically, 0

    def killed(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written == at:
            raise KeyboardInterrupt
        writing(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(cells_module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            swept(loaded, source, folder=tmp_path)
    assert len(list((tmp_path / "cells").glob("*.json"))) == at - 1
    after = swept(loaded, source, folder=tmp_path)
    assert after.cells["reused"] == at - 1
    assert after[:3] == whole[:3]
    again = swept(loaded, source, folder=tmp_path)
    assert again.cells["measured"] == 0
    assert again[:3] == whole[:3]


def test_a_damaged_cell_is_measured_again(loaded: LoadedModel, source: Source, tmp_path: Path) -> None:
    whole = swept(loaded, source, layers="2", folder=tmp_path)
    for number, file in enumerate(sorted((tmp_path / "cells").glob("*.json"))):
        file.write_bytes([b"", b"{", b"[]", json.dumps({"key": {}, "figures": {}}).encode()][number % 4])
    after = swept(loaded, source, layers="2", folder=tmp_path)
    assert after.cells["reused"] == 0
    assert after[:3] == whole[:3]


def test_another_model_or_other_texts_use_none_of_the_cells(
    loaded: LoadedModel, source: Source, tmp_path: Path
) -> None:
    swept(loaded, source, layers="2", folder=tmp_path)
    other = sweep(loaded, source, SIDES._replace(dev=pairs(5)), settings(layers="2", folder=tmp_path))
    assert other.cells["reused"] == 0


def test_where_nothing_stays_within_the_budget_nothing_is_chosen(loaded: LoadedModel, source: Source) -> None:
    result = swept(loaded, source, strengths=(500.0,), budget=0.001)
    assert result.chosen is None
    assert result.test == {}


def test_a_vector_that_steers_the_other_way_gets_no_recommendation(loaded: LoadedModel, source: Source) -> None:
    result = swept(loaded, source, layers="1")
    assert result.chosen is None
    assert result.test == {}
    assert result.points[0].opposite
    assert result.points[0].within
    assert "exchange the two classes in `steer extract` or in `steer sweep`" in why_nothing(result, 0.3)
    assert "with the two classes exchanged it would, too" in why_nothing(result, 0.3, anew=True)
    given = SteeringVector({1: torch.ones(4)}, {"recommended": {"layers": [1], "strength": 2.0, "reason": "given"}})
    of_vector = source._replace(inputs={"vector": given.digest})
    after = record_result(result, given, of_vector, settings(examples=(10, 25)), loaded, {})
    assert after.vector.metadata == given.metadata
    assert "lowers the margin of the 6 development items" in after.report["nothing_recommended"]
    without = "there is no learning curve (--examples 10, 25)"
    assert after.report["no_learning_curve"].startswith(without)
    for words in ("exchange the two classes in `steer extract`", without):
        assert words in page.html(after.report, "report.json")
    assert "no_learning_curve" not in record_result(result, given, of_vector, settings(), loaded, {}).report
    begin = doubted(given, result, 0.3).metadata["recommended"]
    assert begin["reason"].startswith("given; but a sweep recommends nothing: every point")


@pytest.mark.parametrize(
    ("margins", "effect", "within", "words"),
    [
        ([0.1, 0.3], 0.1, False, "no point stays within the budget of 0.3 nats"),
        ([0.3, 0.1], -0.1, True, "steers the other way"),
        ([0.3, 0.3], 0.1, True, "both rise at the strength and fall at minus the strength"),
        ([0.1, 0.1], -0.1, True, "both rise at the strength and fall at minus the strength"),
    ],
)
def test_why_nothing_is_recommended_is_said(margins: list[float], effect: float, within: bool, words: str) -> None:
    point = Point(Candidate("given", (2,), {}), 1.0, 0.1, effect, margins, False, within)
    assert words in why_nothing(Swept([point], None, {}, [], {"dev": 6}, {}, "margin"), 0.3)


def test_an_interval_below_zero_is_said_to_be_the_other_way() -> None:
    effects = [
        Difference(0.0, low, high, 0.01, 0.1, 0.1, 64, 64) for low, high in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))
    ]
    assert [verdict_of(effect) for effect in effects] == ["moves", "does not move", "moves the other way"]


@pytest.mark.parametrize(
    ("groups", "verdict"), [(1, "too few items to say"), (7, "too few items to say"), (8, "moves")]
)
def test_a_verdict_of_test_items_takes_as_many_groups_as_one_of_an_evaluation(groups: int, verdict: str) -> None:
    items = [Pair(Example("a"), Example("b"), group=f"g{i % groups}", id=f"{i}") for i in range(40)]

    class Measured:
        def figures(self, compositions: list[Any]) -> list[list[float]]:
            return [[0.0 if at is None else 1.0 + 0.01 * i for i in range(40)] for at in compositions]

    point = Point(Candidate("given", (2,), {2: torch.ones(4)}), 1.0, 0.1, 1.0, [-1.0, 1.0], True, True)
    test = figures_of_test(point, Measured(), items, 0) | {"p95": 0.1}  # type: ignore[arg-type]
    assert test["verdict"] == verdict
    swept = Swept([point], point, test, [], {"dev": 20, "test": 40}, {}, "margin")
    reason = recommendation(swept, 0.3)["reason"]
    assert ("no verdict, since the items belong to" in reason) == (groups < 8)
    assert "inf" not in reason


def test_what_is_wrong_is_refused_at_once(loaded: LoadedModel, source: Source) -> None:
    with pytest.raises(UsageError) as error:
        swept(loaded, source, layers="2,7", strengths=(-1.0,), examples=(1,), budget=0.0)
    assert len(error.value.problems) == 5  # with a learning curve of a vector alone


def test_what_is_wrong_with_the_settings_is_said_before_a_model_is_opened(tmp_path: Path) -> None:
    vector = SteeringVector({2: torch.ones(4)}, {"base": {"digest": "sha256:0", "name": "no such model"}})
    with pytest.raises(SteerError) as error:
        steer.sweep(vector, pairs=tmp_path / "absent.jsonl", layers="7", strengths=-1, budget_kl=-1)
    for words in ("-1 nats is not positive", "the strength -1 is not", "no direction at layer 7", "absent.jsonl"):
        assert words in str(error.value)
    assert "exchange the two classes, here and in the `steer extract`" in error.value.hint
    with pytest.raises(UsageError, match="no direction at layer 9"):
        sweep_examples(contrast(60), settings(layers="9"), model=unloaded())


def test_a_vector_of_another_size_is_refused_by_its_file_before_the_model_is_loaded(tmp_path: Path) -> None:
    SteeringVector({2: torch.ones(4)}).save(tmp_path / "v.safetensors")
    lines = [{"prompt": f"{i}?", "positive": " yes", "negative": " no"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ArtifactError, match=rf"the vector {tmp_path / 'v.safetensors'} has hidden size 4"):
        steer.sweep(tmp_path / "v.safetensors", pairs=tmp_path / "pairs.jsonl", model=unloaded())


def unloaded() -> LoadedModel:
    """What would fail if anything went through it."""
    whole = planted.loaded(planted.transparent_model())
    for block in whole.model.model.layers:
        block.forward = None
    return whole


def test_groups_of_layers_are_read() -> None:
    assert parse_groups("3-5, 10+14, 8..10") == [(3,), (4,), (5,), (10, 14), (8, 9, 10)]
    assert parse_groups("auto") is None
    with pytest.raises(UsageError) as error:
        parse_groups("x,3+y,a..b,9..8")
    assert error.value.problems == (
        "'x' in 'x' is not a layer or a range of layers", "'y' in 'y' is not a layer or a range of layers",
        "'a..b' is not a band of layers", "the band 9..8 descends",
    )  # fmt: skip
    assert error.value.hint.endswith("write a band such as 8..12; write 8..9")


@pytest.mark.parametrize("text", ["3", "0+1", "2+5", "0..2", "8..12", "3+8-12", "1+3+5", "1-2+4"])
def test_layers_that_act_together_are_written_as_they_are_typed(text: str) -> None:
    (group,) = parse_groups(text) or []
    assert together(group) == text
    assert Candidate("diffmean", group, {}).name == f"diffmean[{text}]"
    assert page.name({"method": "diffmean", "layers": list(group)}) == f"diffmean {text}"


@pytest.mark.parametrize("best", range(0, 21, 4))
def test_the_golden_section_finds_the_best_layer_with_few_of_them(best: int) -> None:
    tried: list[int] = []

    def point(layer: int) -> Any:
        tried.append(layer)
        return type("Point", (), {"effect": -abs(layer - best), "within": True})

    golden(21, point)
    assert best in tried
    assert len(tried) == len(set(tried)) <= 10


@pytest.mark.parametrize("prompt", ["q {}?", None], ids=["with prompts", "texts with one negative"])
def test_an_evaluation_recognises_what_a_sweep_chose_on_and_with_its_seed_there_is_nothing(prompt: str | None) -> None:
    prompts = [prompt and prompt.format(i) for i in range(60)]
    items = [Pair(Example(f"yes {i}", prompt), Example("no", prompt), id=f"{i}") for i, prompt in enumerate(prompts)]
    first, second = (Suite("", with_sides(items, seed)) for seed in (0, 1))
    vector = SteeringVector({1: torch.ones(4)}, {"chosen_on": record_of(first.of("dev"), first.of("test"))})
    (subject,) = subjects_of(["warm"], {"warm": vector})
    assert overlaps(subject, first.of("test")) == []
    both = {item.id for item in first.of("dev")} & {item.id for item in second.of("test")}
    assert both
    (sentence,) = overlaps(subject, second.of("test"))
    assert sentence.startswith(
        f"{len(both)} of the {len(second.of('test'))} test items are among the development items"
    )


@pytest.mark.parametrize("affordable", [range(3), range(16, 21), range(10, 11), range(0)])
def test_the_golden_section_finds_the_layers_within_the_budget_wherever_they_are(affordable: range) -> None:
    tried: list[int] = []

    def point(layer: int) -> Any:
        tried.append(layer)
        return type("Point", (), {"effect": 1.0, "within": layer in affordable})

    golden(21, point)
    assert set(affordable) <= set(tried)
    assert len(tried) == len(set(tried))


def contrast(count: int, *, paired: bool = False) -> Contrast:
    sides = [[Example(f" {text} {i}", f"q {i}?") for i in range(count)] for text in ("yes the warm", "no and cold")]
    return Contrast(*sides, paired, {"pos": "sha256:1", "neg": "sha256:2"})


@pytest.mark.parametrize("paired", [True, False])
def test_parts_follow_from_content_and_share_no_prompt(paired: bool) -> None:
    data = contrast(60, paired=paired)
    parts = parts_of(data, 0)
    prompts = [
        {example.context for example in parts.extraction.positive},
        *({pair.positive.context for pair in side} for side in (parts.dev, parts.test)),
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    again = parts_of(data._replace(positive=data.positive[::-1], negative=data.negative[::-1]), 0)
    assert {pair.id for pair in again.test} == {pair.id for pair in parts.test}
    with pytest.raises(ExampleError, match="leave nothing for: dev, test"):
        parts_of(contrast(1), 0)


def test_extraction_and_sweep_in_one_go_recommend_and_leave_a_record(loaded: LoadedModel, tmp_path: Path) -> None:
    result = sweep_examples(
        contrast(60), settings(layers="1,2", examples=(4, 100), folder=tmp_path), model=loaded,
        methods=("diffmean", "whitened"),
    )  # fmt: skip
    metadata = result.vector.metadata
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        metadata["recommended"]["run"]
        == report["digest"]
        == json.loads((tmp_path / "run.json").read_text())["details"]["digest"]
    )
    assert metadata["apply"] == metadata["recommended"]["layers"]
    parts = parts_of(contrast(60), 0)
    assert metadata["chosen_on"] == record_of(parts.dev, parts.test)
    (subject,) = subjects_of(["warm"], {"warm": result.vector})  # what `steer eval` does with it
    layers, strength = metadata["recommended"]["layers"], metadata["recommended"]["strength"]
    assert acting_layers(subject.arm) == layers
    assert str(subject.arm.composition) == f"{strength:g}*warm"
    assert subject.point == f"the vector's recommendation by a sweep: strength {strength:g} at layer {layers[0]}"
    assert {point["method"] for point in report["points"]} == {"diffmean", "whitened"}
    few, most = report["learning"]
    assert (few["examples"], few["repeats"], most["repeats"]) == (4, 5, 1)
    assert few["low"] <= few["effect"] <= few["high"]
    assert most["examples"] < 60
    result.vector.save(tmp_path / "v.safetensors")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page
