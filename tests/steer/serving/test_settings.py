"""The settings file: everything that is wrong with it is said at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fakes
import pytest

from steer.serving import settings
from steer.serving.engine.admission import Admission
from vectors.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vectors").mkdir()
    fakes.vectors()["warm"].save(tmp_path / "vectors" / "warm.safetensors")
    return tmp_path


def test_what_it_says_is_read_and_paths_are_relative_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "steer.yaml"
    file.write_text(
        "vectors: {warm: vectors/warm.safetensors}\narms: {friendly: 2 * warm}\nrows: 9\ndirections: 0\nphases: 3\n"
        "max_body: 5000\n"
        "folders: [vectors]\nany_base: true\n"
    )
    monkeypatch.chdir("/")
    monkeypatch.setenv(settings.CONFIG, str(file))
    found = settings.from_environment()
    assert found.vectors["warm"].digest == fakes.vectors()["warm"].digest
    assert str(found.arms["friendly"]) == "2*warm"
    assert (found.rows, found.directions, found.phases, found.max_body) == (9, 0, 3, 5000)
    assert (found.folders, found.any_base) == ((folder / "vectors",), True)
    assert found.graph() == {"rows": 9, "directions": 0}


def test_without_a_file_or_with_an_empty_one_there_are_the_defaults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(settings.CONFIG, raising=False)
    assert settings.from_environment() == settings.Settings()
    (folder / "empty.yaml").touch()
    assert settings.read(folder / "empty.yaml") == settings.Settings()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"colour": 1}, "no 'colour'"),
        ({"max_body": 0}, "max_body is 0, not a whole number from 1"),
        ({"max_body": "64MiB"}, "max_body is '64MiB', not a whole number"),
        ({"vectors": ["warm"]}, "not a mapping from names to files"),
        ({"vectors": {"warm": 5}}, "is not a name and a file"),
        ({"vectors": {"warm": "missing.safetensors"}}, "missing.safetensors"),
        ({"vectors": {"a\nb": "vectors/warm.safetensors"}}, "can't be the name of a vector"),
        ({"arms": ["a"]}, "not a mapping from names to expressions"),
        ({"arms": {"a": 5}}, "is not a name and an expression"),
        ({"arms": {"a:b": "warm"}}, "can't be part of a model's name"),
        ({"arms": {"a": "2*("}}, "arm 'a'"),
        ({"arms": {"a": "2*nobody"}}, "arm 'a' uses nobody"),
        ({"rows": 0}, "rows is 0, not a whole number from 1 to 65535"),
        ({"rows": True}, "rows is True"),
        ({"directions": 1.5}, "directions is 1.5, not a whole number from 0"),
        ({"phases": 0}, "phases is 0, not a whole number from 1 to 512"),
        ({"folders": "here"}, "folders is 'here', not a list"),
        ({"folders": ["nowhere"]}, "nowhere does not exist"),
        ({"any_base": "yes"}, "any_base is 'yes', not true or false"),
    ],
)
def test_each_mistake_is_named(wrong: dict[str, Any], reason: str, folder: Path) -> None:
    good = {"vectors": {"warm": "vectors/warm.safetensors"}}
    with pytest.raises(UsageError) as caught:
        settings.check({**good, **wrong}, folder)
    assert any(reason in problem for problem in caught.value.problems), caught.value.problems


def test_all_mistakes_are_said_at_once(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        settings.check({"colour": 1, "rows": 0, "vectors": {"a": "missing.safetensors"}, "arms": {"b": "a +"}}, folder)
    assert len(caught.value.problems) >= 4


@pytest.mark.parametrize("content", ["[1, 2]", "{", "a: &a [*a]\nb: !!python/object:os.system x"])
def test_a_file_that_holds_no_settings_is_refused(content: str, folder: Path) -> None:
    (folder / "bad.yaml").write_text(content)
    with pytest.raises(UsageError, match="the settings"):
        settings.read(folder / "bad.yaml")
    with pytest.raises(UsageError, match="can't be read: No such file"):
        settings.read(folder / "absent.yaml")


def test_json_is_yaml(folder: Path) -> None:
    (folder / "s.json").write_text(json.dumps({"rows": 3}))
    assert settings.read(folder / "s.json").rows == 3


def written(folder: Path, name: str = "tone", **changes: Any) -> str:
    """The file of an experiment whose arm names the vector `warm`."""
    arms = {"control": {}, "friendly": {"steer": "1.2*warm"}}
    values = {"name": name, "salt": f"{name}-salt", "arms": arms, "metric": {"name": "thumbs"}}
    values["vectors"] = {"warm": "vectors/warm.safetensors"}
    given = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(json.dumps(given))
    return f"{name}.yaml"


def test_the_vectors_of_an_experiment_are_loaded_with_it(folder: Path) -> None:
    found = settings.check({"experiments": {written(folder): None}}, folder)
    assert [experiment.name for experiment in found.experiments] == ["tone"]
    assert list(found.vectors) == ["warm"]
    assert not found.arms  # its arms are not called MODEL:ARM


def test_the_conditions_and_steps_of_an_experiment_s_arms_are_provided_for(folder: Path) -> None:
    fakes.probes()["joy"].save(folder / "joy.safetensors")
    steers = {"gated": "warm[3]@while:joy>1", "turned": "rotate(warm, 30)"}
    arms = {"control": {}, **{name: {"steer": text} for name, text in steers.items()}}
    found = settings.check({"experiments": {written(folder, arms=arms): None}}, folder)
    assert list(found.probes) == ["joy"]
    assert (found.gates, found.gate_layers, found.steps) == (2, (1,), 1)
    Admission(found, fakes.HIDDEN, fakes.LAYERS, None)
    with pytest.raises(UsageError, match="experiment tone, arm gated: the expression has the condition"):
        Admission(dataclasses.replace(found, gates=0), fakes.HIDDEN, fakes.LAYERS, None)


def test_an_experiment_that_has_changed_since_it_was_checked_is_refused(folder: Path) -> None:
    digest = settings.check({"experiments": {written(folder): None}}, folder).experiments[0].digest
    assert settings.check({"experiments": {"tone.yaml": digest}}, folder).experiments[0].digest == digest
    written(folder, coverage=0.5)
    with pytest.raises(UsageError, match="tone has changed"):
        settings.check({"experiments": {"tone.yaml": digest}}, folder)


def test_what_experiments_can_t_share_is_named_at_once(folder: Path) -> None:
    fakes.vectors()["calm"].save(folder / "calm.safetensors")
    one = written(folder, "one", clients_call="model")
    two = written(folder, "two", clients_call="model", vectors={"warm": "calm.safetensors"})
    with pytest.raises(UsageError) as raised:
        settings.check({"experiments": {one: None, two: None, "missing.yaml": None}}, folder)
    text = str(raised.value)
    for part in (
        "has another vector warm",
        "one, two all take the requests for the model",
        "missing.yaml can't be read",
    ):
        assert part in text


def test_probes_turn_gates_on_at_the_layers_that_they_and_the_arms_read(folder: Path) -> None:
    fakes.probes()["joy"].save(folder / "joy.safetensors")
    vectors = {"warm": "vectors/warm.safetensors"}
    found = settings.check({"vectors": vectors}, folder)
    assert (found.gates, found.gate_layers, found.probes) == (0, None, {})
    assert "gates" not in found.graph(), "without gates the graph is the same as before there were any"
    both = {**vectors, "joy": "joy.safetensors"}
    found = settings.check({"vectors": both}, folder)
    assert found.probes["joy"].digest == fakes.probes()["joy"].digest
    assert list(found.vectors) == ["warm"]
    assert found.graph() == {"rows": 256, "directions": 4, "gates": 2, "gate_layers": [1]}
    found = settings.check({"vectors": both, "arms": {"a": "warm[3]@while:warm[0]>1"}}, folder)
    assert (found.gates, found.gate_layers) == (2, (0, 1))
    assert settings.check({"vectors": both, "gates": 0}, folder).gates == 0
    assert settings.check({"vectors": both, "gate_layers": [2, 0]}, folder).gate_layers == (0, 2)
    assert settings.check({"vectors": both, "gate_layers": "all"}, folder).gate_layers is None
    assert settings.check({"vectors": vectors, "gates": 1}, folder).gate_layers is None
    sectioned = {"vectors": vectors, "arms": {"a": "warm@answer"}}
    found = settings.check(sectioned, folder)
    assert (found.gates, found.gate_layers) == (2, ()), "sections read no layer"
    assert found.graph()["gate_layers"] == []
    assert settings.check({**sectioned, "gates": 1}, folder).gate_layers is None
    for wrong in ({"gates": 5}, {"gates": True}, {"gate_layers": []}, {"gate_layers": [-1]}, {"gate_layers": "some"}):
        with pytest.raises(UsageError, match="gate"):
            settings.check({"vectors": both, **wrong}, folder)
    with pytest.raises(UsageError, match="uses fury, but no vector has that name"):
        settings.check({"vectors": both, "arms": {"a": "warm[3]@when:fury>1"}}, folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"salt": "one-salt"}, "one and two have the same salt"),
        ({"salt": None}, "two.yaml has no salt"),
        ({"namespace": {"name": "chat", "range": [0.4, 1]}}, "ranges overlap: [0, 0.5] and [0.4, 1]"),
        ({"namespace": {"name": "chat", "range": [0.5, 1]}, "unit": "user"}, "different units, conversation and user"),
        ({"namespace": {"name": "chat", "range": [0.5, 1]}}, None),
        ({"namespace": {"name": "other", "range": [0, 1]}, "unit": "user"}, None),
    ],
)
def test_experiments_of_a_server_are_independent_or_exclusive(
    changes: dict[str, Any], problem: str | None, folder: Path
) -> None:
    one = written(folder, "one", namespace={"name": "chat", "range": [0, 0.5]})
    values = {"experiments": {one: None, written(folder, "two", **changes): None}}
    if problem is None:
        assert len(settings.check(values, folder).experiments) == 2
        return
    with pytest.raises(UsageError) as raised:
        settings.check(values, folder)
    assert [problem in each for each in raised.value.problems] == [True]
    assert "one-salt" not in str(raised.value) + raised.value.hint  # who reads the log of a server must not know it
