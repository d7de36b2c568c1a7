"""Evaluations from end to end, on a model whose figures are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import planted
import pytest
import torch

from probes.data import overlap
from probes.data.examples import Example
from steer.evaluation.api import evaluate
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.subjects import Subject, problems_of_names
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.exports.references import references_of
from steer.evaluation.judgement import value_of
from steer.evaluation.report import of_conditions, report
from steer.evaluation.suites.files import pairs_of
from steer.evaluation.suites.items import Pair
from steer.reports.evaluation import against_prompt, other_behaviours, pictures
from vectors.errors import ExampleError, SteerError, UsageError
from vectors.storage.runs import read_json

WARM, COLD = "kmpt", "bdfg"  # letters that a warm and a cold completion are made of


def word(letters: str, number: int) -> str:
    return "".join(letters[(number // 4**place) % 4] for place in range(5))


def ids_of(letters: str) -> list[int]:
    return [pico.tokenizer()(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a vector that works in it, one along nothing, and pairs of completions."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = planted.transparent_model()
    model.save_pretrained(folder / "model")
    pico.tokenizer().save_pretrained(folder / "model")
    vector = planted.towards(model, ids_of(WARM), ids_of(COLD), length=1.0)
    vector.save(folder / "warm.safetensors")
    generator = torch.Generator().manual_seed(3)
    other = {1: torch.randn(pico.HIDDEN, generator=generator)}
    other[1] = other[1] / other[1].norm()
    type(vector)(other, {"apply": [1]}).save(folder / "other.safetensors")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(120):
            pair = {"prompt": f"prompt {i}", "positive": word(WARM, 7 * i), "negative": word(COLD, 7 * i)}
            file.write(json.dumps({**pair, "group": f"g{i % 12}"}) + "\n")
    return folder


def evaluated(folder: Path, *subjects: str, **options: Any) -> Evaluation:
    settings: dict[str, Any] = {"model": str(folder / "model"), "max_tokens": 4, "draws": 4, "curve": (-1, 1)}
    if not {"pairs", "suite"} & set(options):
        settings["pairs"] = folder / "pairs.jsonl"
    return evaluate(*subjects, **(settings | options))


@pytest.fixture(scope="module")
def both(folder: Path) -> Evaluation:
    return evaluated(folder, str(folder / "warm.safetensors"), str(folder / "other.safetensors"), prompt="Be kind.")


def test_a_planted_direction_works_and_one_along_nothing_does_not(both: Evaluation) -> None:
    warm, other = both.subjects
    assert warm.outcome == "works", warm.sentence
    assert other.outcome == "does not work", other.sentence
    assert "works: it moves the margin by" in warm.sentence
    assert warm.judged[0].slopes is not None
    assert warm.judged[0].slopes.anti_steered < 0.1


def test_the_prompt_is_compared_in_pairs_alone_and_with_the_subject(both: Evaluation) -> None:
    warm, other = (subject.judged[0] for subject in both.subjects)
    means = {name: effect.mean for name, effect in both.effects["margin"].items()}
    prompt, added = means["prompt: Be kind."], means["prompt + " + both.subjects[0].plan.subject.arm.name]
    assert warm.beyond_prompt is not None
    assert warm.added_to_prompt is not None
    assert warm.beyond_prompt.mean == pytest.approx(warm.effect.mean - prompt, abs=1e-6)
    assert warm.added_to_prompt.mean == pytest.approx(added - prompt, abs=1e-6)
    more, adds = against_prompt(value_of(warm))
    assert more.startswith("margin, subject less prompt: +")
    assert more.endswith("; the subject moves it more")
    assert adds.startswith("margin, prompt + subject less prompt: +")
    assert adds.endswith("; the subject adds to the prompt")
    assert against_prompt(value_of(other))[1].endswith("; the subject takes away from the prompt")


@pytest.mark.parametrize(
    ("outcome", "low", "high", "said"),
    [
        ("works", 0.1, 0.3, "+0.200 (+0.100 to +0.300); the subject moves it more"),
        ("works", -0.3, -0.1, "-0.200 (-0.300 to -0.100); the prompt moves it more"),
        (
            "does not work",
            -0.1,
            0.1,
            "+0.000 (-0.100 to +0.100); no difference is shown, and one of 0.150 would be detected",
        ),
        ("too few items", None, None, "+0.200; too few items to say which is greater"),
    ],
)
def test_a_comparison_with_the_prompt_says_which_is_greater_only_where_the_interval_does(
    outcome: str, low: float | None, high: float | None, said: str
) -> None:
    mean = 0.2 if low is None or high is None else (low + high) / 2
    found = {"mean": mean, "low": low, "high": high, "detectable": 0.15}
    metric = {"metric": "margin", "outcome": outcome, "beyond_prompt": found, "added_to_prompt": None}
    (line,) = against_prompt(metric)
    assert line == f"margin, subject less prompt: {said}"
    assert against_prompt({**metric, "beyond_prompt": None}) == []


def test_a_section_that_the_model_has_no_markers_for_is_refused_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.evaluation import evaluation

    monkeypatch.setattr(evaluation, "load", lambda *_: pytest.fail("the model was loaded"))
    vectors = {"warm": folder / "warm.safetensors"}
    with pytest.raises(UsageError, match="@answer needs the model's markers of thinking") as caught:
        evaluated(folder, "warm@answer", "warm@thinking", vectors=vectors)
    assert len(caught.value.problems) == 2
    assert "--steer-markers thinking=BEGIN,END" in caught.value.hint


def test_conditions_that_hold_at_no_token_are_named_where_they_make_the_figures_those_of_the_base(folder: Path) -> None:
    options: dict[str, Any] = {"vectors": {"warm": folder / "warm.safetensors"}, "control": ("negation",)}
    nowhere = evaluated(folder, "warm@thinking", steer_markers=("thinking=xqzx,yqzy",), **options)
    notes = report(nowhere)["notes"]
    assert "warm@thinking changes no test item: @thinking holds at none of their tokens" in notes
    assert any(
        note.startswith("@thinking holds at no token of the neutral text, so the KL says nothing") for note in notes
    )
    (result,) = nowhere.subjects  # what has no test items changes none, and that says nothing
    assert not any("changes no test item" in line for line in of_conditions(nowhere, result._replace(judged=[])))
    somewhere = evaluated(folder, "warm@answer", steer_markers=("thinking=xqzx,yqzy",), **options)
    assert somewhere.subjects[0].judged[0].effect.mean > 0.1
    assert not any("holds at no" in note for note in report(somewhere)["notes"])


def test_effect_and_slope_are_those_of_the_closed_form(both: Evaluation) -> None:
    subject = both.subjects[0].plan.subject.arm
    direction = next(iter(subject.vectors.values())).layers[1]
    from steer.evaluation.measuring.rendering import rendered_items

    model, figures = both.model.model, {}
    for strength in (-1.0, 0.0, 1.0):
        figures[strength] = torch.tensor(
            [
                item.figure([
                    planted.log_likelihood(model, list(c.prompt_ids), list(c.completion_ids), direction, strength)
                    for c in item.completions
                ])
                for item in rendered_items(both.inputs.test, both.model.tokenizer, None)
            ]
        )  # fmt: skip
    judged = both.subjects[0].judged[0]
    assert judged.effect.mean == pytest.approx(float((figures[1.0] - figures[0.0]).mean()), abs=1e-5)
    assert judged.slopes is not None
    assert judged.slopes.mean == pytest.approx(float((figures[1.0] - figures[-1.0]).mean()) / 2, abs=1e-5)


def test_a_preference_for_an_answer_is_no_behaviour(folder: Path, tmp_path: Path) -> None:
    """The vector raises warm words whatever is asked; on 75 of 105 items the warm word is the positive answer."""
    lines, warm, cold = [], word(WARM, 5), word(COLD, 5)
    for i in range(105):
        positive, negative = (warm, cold) if i % 7 < 5 else (cold, warm)
        lines.append(json.dumps({"prompt": f"prompt {i}", "positive": positive, "negative": negative}))
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines))
    found = evaluated(folder, str(folder / "warm.safetensors"), pairs=path, control=("negation",)).subjects[0]
    judged = found.judged[0]
    assert judged.by_answer is not None
    assert judged.by_answer[warm] > 0.1
    assert judged.by_answer[cold] == pytest.approx(-judged.by_answer[warm], rel=0.05)
    assert abs(judged.effect.mean) < 0.02 * judged.by_answer[warm]
    assert found.outcome != "works"
    # Single items show what they do, not what they would without the preference.
    assert judged.slopes is not None
    assert 0.2 < judged.slopes.anti_steered < 0.4


def test_the_verdict_is_against_every_family_of_controls(both: Evaluation) -> None:
    compared = {each.control: each.draws for each in both.subjects[0].judged[0].verdict.against}
    assert compared == {"base": 1, "negation": 1, "shuffled": 8, "random": 4, "random-kl": 4, "orthogonal": 4}
    subject = both.subjects[0].plan.subject.arm.name
    for family in ("random-kl",):
        for arm in both.subjects[0].plan.controls[family]:
            assert both.divergences[arm.name].p95 == pytest.approx(both.divergences[subject].p95, rel=0.15)


def test_the_report_is_json_and_names_what_it_measured(both: Evaluation) -> None:
    value = json.loads(json.dumps(report(both), allow_nan=False))
    assert {arm["family"] for arm in value["arms"]} >= {"base", "subject", "prompt", "prompt + subject", "random"}
    assert set(value["examples"][0]["answers"]) >= {"base", "prompt: Be kind.", both.subjects[0].plan.subject.name}
    metric = value["subjects"][0]["metrics"][0]
    assert [point["factor"] for point in metric["curve"]] == [-1, 0, 1]
    assert metric["groups"] == 12
    assert metric["out_of_template"]["items"] > 0
    assert value["subjects"][0]["operating_point"]["dose"] > 0


def test_single_items_have_slopes_whichever_controls_are_asked_for_or_a_note_says_why_not(folder: Path) -> None:
    warm, options = str(folder / "warm.safetensors"), {"max_tokens": 0, "items": 32, "curve": ()}
    without, level = evaluated(folder, warm, "clamp(warm, 1)", vectors={"warm": folder / "warm.safetensors"},
                               control=("none",), **options).subjects  # fmt: skip
    (beaten,) = evaluated(folder, warm, control=("negation",), **options).subjects
    assert without.judged[0].slopes == beaten.judged[0].slopes is not None
    assert [each.control for each in without.judged[0].verdict.against] == ["base"]
    assert "is no control" in without.plan.notes[0]
    assert level.judged[0].slopes is None
    assert "single items have no slopes" in level.plan.notes[0]


def test_the_items_of_development_do_not_enter_the_figures_of_the_test(folder: Path) -> None:
    """With the classes of all development items exchanged, the test figures of what no items made are the same."""
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    options = {"control": ("random", "negation"), "max_tokens": 0, "items": 40}
    plain = evaluated(folder, str(folder / "warm.safetensors"), **options)
    dev = {item.positive.context for item in plain.inputs.suite.of("dev")}  # type: ignore[union-attr]
    for line in lines:
        if line["prompt"] in dev:
            line["positive"], line["negative"] = line["negative"], line["positive"]
    path = folder / "exchanged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changed = evaluated(folder, str(folder / "warm.safetensors"), pairs=path, **options)
    assert torch.equal(plain.figures, changed.figures)
    assert plain.subjects[0].judged[0].verdict == changed.subjects[0].judged[0].verdict
    assert plain.subjects[0].judged[0].curve != changed.subjects[0].judged[0].curve


def test_the_order_of_the_items_changes_nothing(folder: Path) -> None:
    path = folder / "backwards.jsonl"
    path.write_text("\n".join((folder / "pairs.jsonl").read_text().splitlines()[::-1]))
    options = {"control": ("random",), "max_tokens": 0, "items": 40}
    first = evaluated(folder, str(folder / "warm.safetensors"), **options).subjects[0].judged[0]
    second = evaluated(folder, str(folder / "warm.safetensors"), pairs=path, **options).subjects[0].judged[0]
    assert second.effect.mean == pytest.approx(first.effect.mean, abs=1e-6)
    assert second.effect.low == pytest.approx(first.effect.low, abs=1e-6)
    assert second.verdict.outcome == first.verdict.outcome


def test_prompts_models_and_weak_strengths_are_subjects_too(folder: Path) -> None:
    found = evaluated(folder, "prompt:Be kind.", str(folder / "model"), control=("negation",))
    prompt, model = found.subjects
    assert model.judged[0].effect.mean == pytest.approx(0, abs=1e-6)
    assert model.outcome == "does not work"
    assert prompt.plan.controls.keys() == {"base"}
    assert any("is no vector" in note for note in prompt.plan.notes)


def test_under_thirty_items_there_is_no_verdict(folder: Path) -> None:
    found = evaluated(folder, str(folder / "warm.safetensors"), items=20, control=("random",), max_tokens=0)
    assert found.subjects[0].outcome == "too few items"
    assert "can't be judged" in found.subjects[0].sentence


def test_items_of_the_extraction_are_refused_and_allowed_items_are_reported(folder: Path) -> None:
    from vectors.steering import SteeringVector

    vector = SteeringVector.load(folder / "warm.safetensors")
    used = [Example(word(WARM, 7 * i), f"prompt {i}") for i in range(120)]
    data = overlap.record(used)
    SteeringVector(vector.layers, {"apply": [1], "data": data}).save(folder / "used.safetensors")
    subject = str(folder / "used.safetensors")
    with pytest.raises(ExampleError, match="of the 64 test items are among the examples that used was extracted from"):
        evaluated(folder, subject)
    found = evaluated(folder, subject, allow_overlap=True, control=("negation",), max_tokens=0)
    assert "overlap" in json.dumps(report(found)["notes"])
    assert report(found)["overlap"]


def test_all_problems_are_named_before_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("itmes: []")
    with pytest.raises(SteerError) as caught:
        evaluated(
            folder, "nothing", suite=tmp_path / "suite.yaml", donor=tmp_path / "absent.safetensors", device="quantum",
            model="nowhere", prompt=" ", extraction_pos=tmp_path / "absent.jsonl",
        )  # fmt: skip
    text = "\n".join(caught.value.problems)
    for wanted in (
        "itmes",
        "'nothing'",
        "absent.safetensors",
        "quantum",
        "--prompt is empty",
        "--extraction-neg is missing",
    ):
        assert wanted in text
    with pytest.raises(UsageError, match="--control is 'randm'"):
        evaluated(folder, str(folder / "warm.safetensors"), control=("randm",))
    with pytest.raises(TypeError, match="did you mean pairs"):
        evaluate("warm", pair="x")


def test_a_suite_of_another_behaviour_without_test_items_is_refused_as_the_main_one_is(
    folder: Path, tmp_path: Path
) -> None:
    """It made the entanglement NaN, after everything was measured."""
    found = [pairs_of(None, None, [{"prompt": f"p{i}", "positive": "a", "negative": "b"}], 0)[0][0] for i in range(30)]
    dev = next(item for item in found if item.side == "dev")
    assert isinstance(dev, Pair)
    entry = {"kind": "pair", "prompt": dev.positive.context, "positive": "a", "negative": "b"}
    for name in ("first.yaml", "second.yaml"):
        (tmp_path / name).write_text(json.dumps({"items": [entry]}))
    entangled = (tmp_path / "first.yaml", tmp_path / "second.yaml")
    with pytest.raises(ExampleError) as caught:
        evaluated(folder, str(folder / "warm.safetensors"), suite=entangled[0], entangled=entangled, model="nowhere")
    problem = "all items are for development, so there is none for the test"
    assert [*caught.value.problems] == [*(f"the suite {path}: {problem}" for path in entangled), problem]


def test_a_subject_with_the_name_of_another_arm_is_refused(folder: Path) -> None:
    """The arm of that name was measured in its place: a vector named base had an effect of exactly 0."""
    vectors = {name: folder / "warm.safetensors" for name in ("base", "warm", "prompt")}
    with pytest.raises(UsageError) as caught:
        evaluated(folder, "base", "warm", "prompt + warm", vectors=vectors, prompt="Be kind.", device="quantum")
    text = "\n".join(caught.value.problems)
    assert "the subject 'base' has the name of the unsteered model" in text
    assert "the subject 'prompt + warm' has the name of a subject with the prompt of --prompt" in text
    assert "quantum" in text
    assert "1*NAME for a vector" in str(caught.value.hint)
    found = evaluated(folder, "1*base", vectors=vectors, control=("none",), max_tokens=0, items=32)
    assert found.subjects[0].judged[0].effect.mean > 0.1


def test_a_name_is_refused_where_the_controls_of_another_subject_have_it() -> None:
    def problems(*names: str, prompt: str | None = None) -> list[str]:
        return problems_of_names([Subject(name, "model", Arm(name), "") for name in names], prompt)

    assert problems("warm", "warm: random 1") == [
        "the subject 'warm: random 1' may have the name of an arm of the subject 'warm'"
    ]
    assert len(problems("warm", "warm x 2.0", "warm: negation", "base")) == 3
    assert problems("warm", "cold", "prompt + warm", "warm: a folder", "prompt: Be kind.", "prompt") == []


def test_the_folder_holds_the_record_the_report_and_a_page_and_the_vector_refers_to_it(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    file = tmp_path / "warm.safetensors"
    file.write_bytes((folder / "warm.safetensors").read_bytes())
    found = evaluated(folder, str(file), out=out, prompt="Be <b>kind</b>.", entangled=(_suite(folder),),
                      control=("negation",), max_tokens=2)  # fmt: skip
    assert {path.name for path in out.iterdir()} >= {"run.json", "report.json", "report.html"}
    page = (out / "report.html").read_text()
    assert "<b>kind</b>" not in page
    assert "&lt;b&gt;kind&lt;/b&gt;" in page
    assert "works" in page
    assert "margin, subject less prompt: " in page
    assert not {"<script", "<img", "<link", "src=", "@import"} & set(page.split())
    _, record = read_json(out)
    assert record["command"] == "eval"
    assert record["outputs"]["report.json"].startswith("sha256:")
    (reference,) = references_of(file)
    assert reference["report"] == record["outputs"]["report.json"]
    assert reference["vector"] == next(iter(found.subjects[0].plan.subject.arm.vectors.values())).digest
    assert found.subjects[0].entanglement == pytest.approx(abs(found.subjects[0].entangled[0].change.mean))


def test_what_changes_of_other_behaviours_has_its_interval_where_there_is_one() -> None:
    change = {"mean": 0.091, "low": 0.030, "high": 0.152, "items": 23}
    few = {"suite": "tone", "mean": -0.5, "low": None, "high": None, "items": 1}
    (line,) = other_behaviours({"entangled": [{"suite": "science", **change}, few], "entanglement": 0.359})
    assert line == (
        "other behaviours: science +0.091 (+0.030 to +0.152; 23 items), tone -0.500 (1 item); root mean square 0.359"
    )
    assert other_behaviours({"entangled": [], "entanglement": None}) == []


def test_a_subject_without_a_curve_is_not_in_the_legend_of_the_curves(both: Evaluation) -> None:
    value = report(both)
    names = [subject["subject"] for subject in value["subjects"]]
    value["subjects"][1]["metrics"][0]["curve"] = []
    drawn = pictures(value)["dose-response"]
    assert [name[-18:] in drawn for name in names] == [True, False]
    for subject in value["subjects"]:
        subject["metrics"][0]["curve"] = []
    assert names[0][-18:] not in pictures(value)["dose-response"]


def test_wrong_options_and_all_that_the_others_name_are_refused_at_once(
    steer: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["no.safetensors", "./no-folder", "--pos", "p.jsonl", "--neg", "n.jsonl", "--entangled", "other.yaml",
                 "--scorer", "foo:bar", "--curve", "x", "--items", "0", "--export", "foo"]  # fmt: skip
    code, _, err = steer("eval", *arguments)
    assert code == 2
    parts = ["--curve: 'x'", "--items is 0", "--export is 'foo'", "there is no scorer 'foo'", "folder ./no-folder"]
    parts += [f"there is no file {file}" for file in ("no.safetensors", "p.jsonl", "n.jsonl", "other.yaml")]
    assert [part for part in parts if part not in err] == []
    code, _, err = steer("eval", "warm", "--vector", "warm", "--pos", "p.jsonl", "--neg", "n.jsonl")
    assert "'warm' is not NAME=FILE" in err
    assert "is not bound" not in err  # which follows from the wrong --vector
    with pytest.raises(UsageError) as caught:  # in Python, too
        evaluate("no.safetensors", items=0, control=("foo",), pos="p.jsonl", neg="n.jsonl")
    assert len(caught.value.problems) == 5


def _suite(folder: Path) -> Path:
    path = folder / "other.yaml"
    path.write_text("name: other\nfiles: {pairs: pairs.jsonl}\n")
    return path


def test_the_command_prints_a_verdict_and_the_same_in_json(
    folder: Path, steer: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = [
        "eval", folder / "warm.safetensors", "--pairs", folder / "pairs.jsonl", "--model", folder / "model",
        "--control", "negation", "--max-tokens", 1, "--curve", "-1,1", "--items", 32, "--entangled", _suite(folder),
    ]  # fmt: skip
    code, out, err = steer(*arguments)
    assert code == 0, err
    assert "works: it moves the margin by +" in out
    assert "KL p95" in out
    assert "other behaviours: other +" in out
    code, out, _ = steer(*arguments, "--json")
    value = json.loads(out)
    assert value["subjects"][0]["outcome"] == "works"
    assert value["command"].startswith("steer eval ")
    code, out, err = steer("eval", folder / "warm.safetensors")
    assert code == 2
    assert "nothing to evaluate on" in err
