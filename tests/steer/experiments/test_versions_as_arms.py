"""Versions of the store as arms: frozen by their vectors, pinned by init, and moved to by promote."""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "store"))

from personalities import commit, new_store

from steer.cli import run
from steer.experiments import document
from steer.experiments.assignment import hashed
from steer.experiments.storage import state
from steer.experiments.storage.database import open_log, write
from steer.store import layout, referrers, refs
from steer.store.layout import Store
from steer.store.objects.model import read_commit
from vectors.errors import UsageError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with the version tone@champion and a newer one, tone."""
    monkeypatch.delenv("STEER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    made = new_store(tmp_path)
    first = commit(made, "Warm", warm=1.2)
    refs.point(made, {refs.alias("tone", "champion"): first}, "x")
    commit(made, "Warmer", warm=1.4, formal=-0.4)
    return made


def written(store: Store, arms: dict[str, Any]) -> Path:
    file = store.work / "trial.yaml"
    values = {"name": "trial", "metric": {"name": "thumbs", "smallest_effect": 0.05}, "arms": arms}
    file.write_text(json.dumps(values))
    return file


def test_an_arm_may_be_a_version_of_the_store_beside_the_file(
    store: Store, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(store, {"control": {}, "now": {"steer": "tone@champion"}, "next": {"steer": "0.5*tone"}})
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # as a server may be started
    found = document.read(file)
    now, later = found.arm("now"), found.arm("next")
    assert now is not None
    assert later is not None
    assert now.commit == refs.target(store, refs.alias("tone", "champion"))
    assert now.steer.startswith("1.2*warm.")
    assert later.commit == ""  # half of a version is no version
    assert later.steer.startswith("0.7*warm.")
    assert set(found.vectors) == set(now.vectors) | set(later.vectors)


def test_an_alias_that_moves_is_another_version_of_the_experiment_and_a_commit_is_not(store: Store) -> None:
    first = refs.target(store, refs.alias("tone", "champion"))
    followed = written(store, {"control": {}, "now": {"steer": "tone@champion"}})
    digest = document.read(followed).digest
    pinned = {"control": {}, "now": {"steer": f"'{first}'"}}
    assert document.read(written(store, pinned)).digest == digest  # the same vectors and strengths
    refs.point(store, {refs.alias("tone", "champion"): refs.target(store, refs.branch("tone"))}, "x")
    assert document.read(written(store, pinned)).digest == digest
    assert document.read(written(store, {"control": {}, "now": {"steer": "tone@champion"}})).digest != digest


def test_an_unknown_version_is_refused_with_a_guess(store: Store) -> None:
    with pytest.raises(UsageError, match="arm now"):
        document.read(written(store, {"control": {}, "now": {"steer": "'tone@champoin'"}}))


def test_init_writes_the_commit_of_a_version_and_what_it_was_called(store: Store) -> None:
    assert run(["ab", "init", "trial.yaml", "--arm", "control=", "--arm", "now=tone@champion", "--arm", "w=warm"]) == 0
    text = (store.work / "trial.yaml").read_text()
    first = refs.target(store, refs.alias("tone", "champion"))
    assert f"""now: {{steer: "'{first}'"}}   # tone@champion""" in text
    assert 'w: {steer: "warm"}' in text
    found = document.read(store.work / "trial.yaml").arm("now")
    assert found is not None
    assert found.commit == first


def decided(store: Store, arms: dict[str, Any], winner: str) -> None:
    """A served experiment in which an arm has won."""
    experiment = document.read(written(store, arms))
    engine = open_log(experiment.log)
    version = state.register(engine, experiment)
    rows: list[tuple[str, dict[str, Any]]] = []
    for arm in experiment.arms:
        for i in range(200):
            response = f"{arm.name}{i}"
            rows.append(("exposures", {
                "id": uuid.uuid4().hex, "experiment": "trial", "version": version, "arm": arm.name, "stage": 0,
                "reason": "assigned", "counted": True, "at": time.time(), "unit": hashed("trial", response),
                "unit_source": "user", "conversation": response, "response": response, "digest": arm.digest,
                "status": 200,
            }))  # fmt: skip
            value = float(i % 4 > (0 if arm.name == winner else 2))
            rows.append(("feedback", {
                "id": uuid.uuid4().hex, "experiment": "trial", "version": version, "response": response,
                "metric": "thumbs", "source": "user", "mark": "", "at": time.time(), "value": value,
            }))  # fmt: skip
    write(engine, rows)
    engine.dispose()


def promoted(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    status = run(["ab", "promote", "trial", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_promote_moves_the_alias_logs_it_and_attaches_the_decision(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (refs.target(store, each) for each in (refs.alias("tone", "champion"), refs.branch("tone")))
    assert new is not None
    decided(store, {"control": {}, "now": {"steer": f"'{old}'"}, "next": {"steer": f"'{new}'"}}, "next")
    status, found = promoted(capsys, "next", "--model", "pico")
    assert status == 0, found
    assert found["alias"] == {"alias": "tone@champion", "commit": new, "before": old}
    assert refs.target(store, refs.alias("tone", "champion")) == new
    assert refs.entries(store)[-1].command.startswith("steer")
    (attached,) = referrers.of(store, read_commit(store, new).composition, referrers.EXPERIMENT)
    assert referrers.read_report(store, attached)["decision"] == "ship"
    assert found["commands"][0] == "steer serve tone@champion"
    assert run(["ab", "status", "trial", "--json"]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert events[-1]["reason"] == f"next: ship; tone@champion is {new[7:15]}"
    assert promoted(capsys, "next")[0] == 0  # twice is no error
    assert run(["undo"]) == 0
    assert refs.target(store, refs.alias("tone", "champion")) == old


def test_promote_refuses_a_version_that_lacks_its_evaluation_and_logs_nothing(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    text = store.file.read_text()
    store.file.write_text(text + "\nevals: [{suite: warm.yaml}]\n")
    new = commit(store, "With an evaluation", warm=1.5)
    decided(store, {"control": {}, "next": {"steer": "tone"}}, "next")
    status, refused = promoted(capsys, "next")
    assert (status, "no evaluation on the suite warm.yaml" in refused["error"]) == (1, True)
    assert refs.target(layout.require(store.work), refs.alias("tone", "champion")) != new
    run(["ab", "status", "trial", "--json"])
    assert [event["kind"] for event in json.loads(capsys.readouterr().out)["events"]] == ["started"]
    assert promoted(capsys, "next", "--force", "--to", "latest")[1]["alias"]["alias"] == "tone@latest"


def test_an_arm_that_is_no_version_moves_no_alias(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    decided(store, {"control": {}, "calm": {"steer": "calm"}}, "calm")
    status, found = promoted(capsys, "calm")
    assert (status, found["alias"]) == (0, None)
