"""An experiment's file: what it means, what is wrong with it, and what its digest covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import trials

from steer.cli import run
from steer.evaluation.scorers import classifier
from steer.experiments import document, template
from steer.experiments.specification import GUARDRAILS
from steer.serving.engine.resolved import ResolvedRequest
from vectors import references
from vectors.errors import UsageError
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector


def problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(UsageError) as raised:
        trials.experiment(folder, **changes)
    return list(raised.value.problems)


def test_a_short_file_is_complete(tmp_path: Path) -> None:
    experiment = trials.experiment(tmp_path)
    assert [(arm.name, arm.steer, arm.weight) for arm in experiment.arms] == [
        ("control", "", 0.5),
        ("friendly", "1.2*warm", 0.5),
    ]
    assert experiment.control.name == "control"
    assert (experiment.unit, experiment.coverage, experiment.steps) == ("conversation", 1.0, (1.0,))
    assert experiment.log == f"sqlite:///{tmp_path}/tone.db"


def test_an_arm_has_the_digest_that_the_engine_shows(tmp_path: Path) -> None:
    arm = trials.experiment(tmp_path).arm("friendly")
    digest = SteeringVector.load(tmp_path / "warm.safetensors").digest
    assert arm is not None
    assert arm.composition == ResolvedRequest("1.2*warm", {"warm": digest}).key


def mood(folder: Path, hidden: int = trials.HIDDEN) -> Probe:
    probe = Probe({0: Readout(torch.ones(hidden), 0.0)})
    probe.save(folder / "mood.safetensors")
    return probe


def test_an_arm_may_have_conditions_whose_probes_are_part_of_its_digest(tmp_path: Path) -> None:
    probe, arms = mood(tmp_path), {"control": {}, "gated": {"steer": "warm[2]@when:mood>0.5"}}
    experiment = trials.experiment(tmp_path, arms=arms)
    arm = experiment.arms[1]
    warm = SteeringVector.load(tmp_path / "warm.safetensors").digest
    assert arm.composition == ResolvedRequest("warm[2]@when:mood>0.5", {"warm": warm, "mood": probe.digest}).key
    assert [source.digest for source in experiment.probes.values()] == [probe.digest]
    assert list(experiment.vectors) == ["warm"]
    Probe({0: Readout(torch.zeros(trials.HIDDEN), 1.0)}).save(tmp_path / "mood.safetensors")
    assert trials.experiment(tmp_path, arms=arms).digest != experiment.digest  # another probe is another version


def test_what_a_condition_can_t_read_is_refused(tmp_path: Path) -> None:
    mood(tmp_path)
    arms = {"control": {}, "late": {"steer": "warm[0]@when:mood>0.5"}, "none": {"steer": "warm@when:joy>0"}}
    found = "\n".join(problems(tmp_path, arms=arms))
    assert "what is read must lie below" in found
    assert "joy" in found
    mood(tmp_path, 2 * trials.HIDDEN)
    assert "hidden size" in problems(tmp_path, arms={"control": {}, "a": {"steer": "warm[2]@when:mood>0.5"}})[0]


def test_a_judge_may_be_a_probe_beside_the_file(tmp_path: Path) -> None:
    probe = mood(tmp_path)
    given = {"judges": [{"name": "mood", "scorer": "probe:mood.safetensors"}], "secondary": [{"name": "mood"}]}
    experiment = trials.experiment(tmp_path, **given)
    assert {name: each.digest for name, each in experiment.readouts.items()} == {"mood": probe.digest}
    assert probe.digest in json.dumps(experiment.frozen()["judges"])
    warm = tmp_path / "warm.safetensors"
    assert "judge mood" in problems(tmp_path, **{**given, "judges": [{"name": "mood", "scorer": f"probe:{warm}"}]})[0]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        coverge=0.5,
        unit="session",
        metric={"name": "thumbs", "better": "up", "kin": "bool"},
        arms={"control": {"weight": 0.5}, "a": {"steer": "1.2*missing", "weight": 0.4}, "b": {"steer": "1.2**warm"}},
        ramp=["5%", "1%"],
        namespace={"name": "chat", "range": [0.5, 0.5]},
    )
    text = "\n".join(found)
    for part in (
        "no \"coverge\" (did you mean coverage?)", "unit is \"session\"", "metric.better is \"up\"", "no \"kin\"",
        "name 'missing' is not bound", "arm b: the expression '1.2**warm' is wrong", "the arms b have no weight",
        "ramp does not ascend", "namespace.range is empty",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arms": {"control": {}}}, "compares at least two arms"),
        ({"arms": {"a": {}, "b": {}}}, "exactly one arm must be the control"),
        ({"arms": {"a": {"steer": "warm"}, "b": {"system": "Be warm."}}}, "there are 0"),
        ({"arms": {"control": {"weight": 0.5}, "a": {"steer": "warm", "weight": 0.6}}}, "sum to 1.1, not to 1"),
        ({"arms": {"control": {}, "a": {"lora": "nowhere"}}}, "the adapter nowhere can't be read"),
        ({"arms": {"control": {}, "a b": {"steer": "warm"}}}, 'the key "a b"'),
        ({"arms": {"control": {}, "a": {"steer": "warm", "stear": "x"}}}, 'arms.a has no "stear"'),
        ({"name": "../tone"}, "name is"),
        ({"name": "<script>"}, "name is"),
        ({"metric": None}, "metric is missing"),
        ({"secondary": [{"name": "thumbs"}]}, "the metric thumbs is given twice"),
        ({"guardrails": {"error_rate": -1}}, "guardrails.error_rate is -1, not above 0"),
        ({"guardrails": {"errors": 1}}, "did you mean"),
        ({"guardrails": {"length_ratio": 0.5}}, "guardrails.length_ratio is 0.5, below 1: an arm that is like"),
        ({"guardrails": {"latency_p95": 0.99}}, "guardrails.latency_p95 is 0.99, below 1"),
        ({"guardrails": {"refusals": 1.5}}, "guardrails.refusals is 1.5, and no share exceeds another by more than 1"),
        ({"log": "mysql://me:secret@x/y"}, "log is a URL of mysql://, not the path of a SQLite file, or postgresql"),
        (
            {"arms": {"control": {"weight": 0}, "a": {"steer": "warm", "weight": 1}}},
            "the control control has the weight 0",
        ),
        ({"arms": {"control": {"weight": 1}, "a": {"steer": "warm", "weight": "0%"}}}, "no arm beside the control has"),
        ({"coverage": "101%"}, "coverage is"),
        ({"judges": [{"name": "kind", "url": "ftp://x", "model": "m", "instruction": "?"}]}, "judges[0].url is"),
        (
            {"judges": [{"name": "kind", "url": "http://u:secret@x/v1", "model": "m", "instruction": "?"}]},
            "would be recorded",
        ),
        ({"arms": {"control": {}, "a": {"steer": "5*warm@whenever"}}}, "wrong at character"),
        ({"judges": [{"name": "kind"}]}, "the judge kind has no url, model, instruction, and no scorer"),
        ({"judges": [{"name": "kind", "scorer": "regex:kind", "model": "m"}]}, "an endpoint or a scorer, not both"),
        ({"judges": [{"name": "kind", "scorer": "magic:kind"}]}, "the judge kind: "),
        ({"judges": [{"name": "kind", "scorer": "regex:\bkind"}]}, r"the control character '\x08' in its scorer"),
        ({"judges": [{"name": "kind", "scorer": "probe:kind.safetensors"}]}, "can't be read: No such file"),
        ({"judges": [{"name": "kind", "scorer": "regex:kind"}]}, "the judge kind is no metric: name it in `secondary`"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    assert problem in "\n".join(problems(tmp_path, **changes))


def test_guardrails_that_are_not_named_have_their_limits_and_null_turns_one_off(tmp_path: Path) -> None:
    limits = trials.experiment(tmp_path, guardrails={"refusals": 0.2, "latency_p95": None}).guardrails
    unnamed = {name: GUARDRAILS[name][0] for name in ("error_rate", "length_ratio", "repetition")}
    assert limits == {**unnamed, "refusals": 0.2}


def test_hints_say_what_to_write_in_the_file(tmp_path: Path) -> None:
    hints = {
        "bind it in the file: vectors: {missing: FILE}": {"arms": {"control": {}, "a": {"steer": "missing"}}},
        "steer ab init writes a file with every key explained": {"coverage": 2},
    }
    for hint, changes in hints.items():
        with pytest.raises(UsageError) as raised:
            trials.experiment(tmp_path, **changes)
        assert raised.value.hint == hint
    (tmp_path / "tabs.yaml").write_text("name:\n\t- x")
    for file, hint in (
        ("tabs.yaml", "steer ab init writes a file with every key explained"),
        ("no.yaml", "steer ab init FILE"),
    ):
        with pytest.raises(UsageError) as raised:
            document.read(tmp_path / file)
        assert hint in raised.value.hint


def test_versions_without_a_store_say_so_and_hints_are_not_repeated(tmp_path: Path) -> None:
    arms = {"control": {}, "a": {"steer": "'tone@champion'"}, "b": {"steer": "x"}, "c": {"steer": "2*y"}}
    trials.written(tmp_path, arms=arms)
    with pytest.raises(UsageError) as raised:
        document.read(tmp_path / "tone.yaml")
    text = "\n".join(raised.value.problems)
    assert "arm a: there is no store beside the file, so 'tone@champion' names no version" in text
    assert "tone@champion.safetensors" not in text
    assert raised.value.hint == "bind them in the file: vectors: {x: FILE, y: FILE}; make a store: steer init"


def test_arms_that_do_the_same_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    warm = {"steer": "1.2*warm"}
    trials.written(tmp_path, arms={"control": {}, "a": warm, "b": warm, "c": {"steer": "warm"}})
    assert run(["ab", "check", "tone"]) == 0
    assert "the arms a and b do the same, so they differ by chance alone" in capsys.readouterr().err


def test_the_model_of_a_judge_that_is_a_classifier_is_sought_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sought in the current folder, while vectors and probes were sought beside the file."""
    (tmp_path / "here").mkdir()
    (tmp_path / "clf").mkdir()
    seen: list[str] = []
    monkeypatch.setattr(classifier, "problems_of", lambda settings: seen.append(settings.model) or [])
    for reference in ("../clf", "org/name"):
        judge = {"name": "cheerful", "scorer": f"classifier:{reference}"}
        trials.experiment(tmp_path / "here", judges=[judge], secondary=[{"name": "cheerful"}])
    assert seen == [str(tmp_path / "here" / "../clf"), "org/name"]
    (problem,) = problems(tmp_path, judges=[{"name": "x", "scorer": "words"}], secondary=[{"name": "x"}])
    assert "the judge x: scorer 'words': " in problem


def test_a_vector_of_another_model_is_refused(tmp_path: Path) -> None:
    model = pico.save(tmp_path / "model")
    identity = references.identity(references.resolve(str(model)))
    trials.vector(tmp_path, "warm", base={**identity, "digest": "sha256:other", "name": "other/model"})
    file = trials.written(tmp_path)
    with pytest.raises(UsageError) as raised:
        document.read(file, model=str(model))
    assert "hidden size 8, the model 32" in str(raised.value)
    assert "belongs to other/model" in str(raised.value)


def test_vectors_of_two_models_are_refused_where_no_model_is_named(tmp_path: Path) -> None:
    trials.vector(tmp_path, "warm", base={"digest": "sha256:a", "name": "model/a"})
    trials.vector(tmp_path, "formal", base={"digest": "sha256:b", "name": "model/b"})
    found = problems(tmp_path, arms={"control": {}, "a": {"steer": "warm + formal"}})
    assert "the vectors belong to different models: warm to model/a, formal to model/b" in "\n".join(found)


def test_the_digest_is_that_of_what_is_served_and_concluded(tmp_path: Path) -> None:
    first = trials.experiment(tmp_path).digest
    same = [{"log": "elsewhere.db"}, {"store_texts": True}, {"coverage": "100%"}, {"unit": "conversation"}]
    assert {trials.experiment(tmp_path, **changes).digest for changes in same} == {first}
    others = [
        {"salt": "another"}, {"coverage": 0.5}, {"unit": "user"}, {"on_breach": "warn"}, {"ramp": ["1%"]},
        {"metric": {"name": "thumbs", "smallest_effect": 0.1}}, {"guardrails": {"refusals": 0.2}},
        {"arms": {"control": {}, "friendly": {"steer": "1.3*warm"}}},
    ]  # fmt: skip
    assert len({trials.experiment(tmp_path, **changes).digest for changes in others} | {first}) == len(others) + 1
    trials.vector(tmp_path, "warm", licence="another file with the same directions")
    assert trials.experiment(tmp_path).digest != first


def test_what_is_written_to_the_log_does_not_hold_the_salt(tmp_path: Path) -> None:
    experiment = trials.experiment(tmp_path)
    assert experiment.salt not in json.dumps(experiment.frozen())


def test_a_ramp_ends_at_the_coverage(tmp_path: Path) -> None:
    experiment = trials.experiment(tmp_path, ramp=["1%", "5%", "50%", "80%"], coverage=0.5)
    assert experiment.steps == (0.01, 0.05, 0.5)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("tone.db", "sqlite:///FOLDER/tone.db"),
        ("/srv/tone.db", "sqlite:////srv/tone.db"),
        ("postgresql://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgres://host/db", "postgresql+psycopg://host/db"),
    ],
)
def test_a_log_is_a_file_or_a_url(tmp_path: Path, text: str, url: str) -> None:
    assert document.log_url(text, tmp_path) == url.replace("FOLDER", str(tmp_path))


def test_init_writes_a_file_that_passes_its_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trials.vector(tmp_path, "warm")
    arms = ["--arm", "control=", "--arm", "friendly=1.2*warm", "--system", 'prompt=You "are": warm. # yes']
    assert run(["ab", "init", "tone.yaml", *arms, "--metric", "thumbs"]) == 0
    assert run(["ab", "check", "tone", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert report["digest"] == document.read(tmp_path / "tone.yaml").digest
    assert report["arms"][2]["system"] == 'You "are": warm. # yes'
    assert run(["ab", "init", "tone.yaml", *arms]) == 1  # never replaced without --force
    assert "exists" in capsys.readouterr().err


def test_every_file_that_init_writes_has_a_salt_of_its_own() -> None:
    draft = template.Draft(name="tone", file="tone.yaml", arms={"control": "", "a": "warm"})
    salts = {line for _ in range(2) for line in template.written(draft).splitlines() if line.startswith("salt:")}
    assert len(salts) == 2


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        (["--arm", "a=warm"], "at least two arms"),
        (["--arm", "a=warm", "--arm", "b=calm"], "no arm is the control"),
        (["--arm", "control", "--arm", "=x"], "is not NAME=EXPRESSION"),
        (["--arm", "control=", "--arm", "a b=warm"], "is not a name"),
        (["--arm", "control=", "--arm", "a=warm", "--arm", "a=calm"], "given twice"),
    ],
)
def test_init_refuses_arms_that_make_no_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arms: list[str], problem: str
) -> None:
    assert run(["ab", "init", str(tmp_path / "tone.yaml"), *arms]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "tone.yaml").exists()


ADAPTIVE = {"allocation": {"method": "track-and-stop"}}


def test_adaptive_weights_are_part_of_the_digest_and_only_where_they_are_given(tmp_path: Path) -> None:
    fixed, adaptive = trials.experiment(tmp_path), trials.experiment(tmp_path, **ADAPTIVE)
    assert (adaptive.allocation.smallest_share, adaptive.allocation.every) == (0.05, 60)  # type: ignore[union-attr]
    assert fixed.allocation is None
    assert "allocation" not in fixed.frozen()
    others = [{"smallest_share": "10%"}, {"every": 30}]
    made = [trials.experiment(tmp_path, allocation={"method": "track-and-stop", **more}) for more in others]
    assert len({each.digest for each in (fixed, adaptive, *made)}) == 4


def test_all_problems_of_adaptive_weights_are_named_at_once(tmp_path: Path) -> None:
    arms = {"control": {"weight": 0.9}, "friendly": {"steer": "1.2*warm", "weight": 0.1}}
    found = problems(
        tmp_path, arms=arms, metric={"name": "thumbs"},
        allocation={"method": "thompson", "smallest_share": 0.2, "evry": 3, "every": 0},
    )  # fmt: skip
    assert found == [
        'tone.yaml: allocation.method is "thompson", not "track-and-stop"',
        "tone.yaml: allocation.every is 0, not a whole number from 1 to 86400",
        'tone.yaml: allocation has no "evry" (did you mean every?)',
        "tone.yaml: allocation needs metric.smallest_effect: arms that differ by less are equally good",
        "tone.yaml: the arm friendly has the weight 0.1, below allocation.smallest_share 0.2",
    ]
    for share in (0.5, 2e-05):  # four decimals would make 0 of the second
        (found,) = problems(tmp_path, allocation={"method": "track-and-stop", "smallest_share": share})
        assert found.startswith(f"tone.yaml: allocation.smallest_share is {share:g}, which 2 arms can't have each")


def test_a_draft_may_have_adaptive_weights_and_has_them_in_a_comment_otherwise(tmp_path: Path) -> None:
    trials.vector(tmp_path, "warm")
    for adaptive in (True, False):
        draft = template.Draft(
            name="tone", file="tone.yaml", arms={"control": "", "friendly": "1.2*warm"}, adaptive=adaptive
        )
        (tmp_path / "tone.yaml").write_text(template.written(draft))
        assert (document.read(tmp_path / "tone.yaml").allocation is not None) is adaptive
        assert "method: track-and-stop" in template.written(draft)
