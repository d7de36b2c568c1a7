"""`steer ab` on a log with known rows: status, stop, promote, export and forget, in both databases."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trials
from sqlalchemy import select
from trials import Ab, Log

from probes.data.reading import read
from steer.cli import run
from steer.experiments.assignment import hashed
from steer.experiments.specification import Metric
from steer.experiments.statistics.moments import Sums
from steer.experiments.storage import figures, state
from steer.experiments.storage.database import write
from steer.experiments.storage.journal import Journal, journal_of
from steer.experiments.storage.tables import EVENTS, EXPOSURES, FEEDBACK
from steer.experiments.storage.writer import written


def test_status_counts_answers_units_and_feedback(log: Log, ab: Ab) -> None:
    log.write(
        "exposures",
        *(log.answer("control", f"u{i}", f"r{i}") for i in range(3)),
        log.answer("control", "u0"),
        log.answer("friendly", "u9", status=500),
        log.answer("friendly", "u9", status=400),
        log.answer("friendly", "u8", reason="forced", counted=False),
    )
    log.write("feedback", log.said("r0", value=1.0), log.said("nothing", mark="unknown", value=0.0))
    status, data, _ = ab("status", "tone")
    assert (status, data["version"], data["stopped"], data["digest"]) == (0, 1, None, log.experiment.digest)
    assert data["arms"]["control"] == {"answers": 4, "counted": 4, "units": 3, "forced": 0, "outside": 0, "failed": 0,
                                       "refused": 0}  # fmt: skip
    assert data["arms"]["friendly"] == {"answers": 3, "counted": 2, "units": 1, "forced": 1, "outside": 0, "failed": 1,
                                        "refused": 1}  # fmt: skip
    assert data["feedback"] == {"thumbs": {"received": 2, "unknown": 1, "late": 0}}


def test_an_experiment_that_was_never_served_says_so(tmp_path: Path, ab: Ab) -> None:
    trials.written(tmp_path)
    status, data, _ = ab("status", "tone")
    assert (status, "has not been served yet" in data["error"]) == (2, True)
    assert "no experiment 'other'" in ab("status", "other")[1]["error"]


@pytest.mark.parametrize(
    "words",
    [
        ("status",), ("report",), ("stop",), ("promote", "friendly"), ("promote", "friendly", "--force"),
        ("forget", "ann"), ("export", "-o", "all.jsonl"), ("export", "--demonstrations", "-o", "pairs.jsonl"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_about_an_experiment_that_has_no_log_begins_none(
    tmp_path: Path, ab: Ab, words: tuple[str, ...]
) -> None:
    trials.written(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, data, _ = ab(words[0], "tone", *words[1:])
    assert (status, "tone has not been served yet" in data["error"]) == (2, True)
    assert f"no file {tmp_path / 'tone.db'}" in data["error"]
    assert sorted(tmp_path.iterdir()) == before


def test_judges_are_measured_without_a_log_and_begin_none(tmp_path: Path, ab: Ab) -> None:
    judge = {"name": "polite", "scorer": "regex:please"}
    trials.written(tmp_path, judges=[judge], secondary=[{"name": "polite"}])
    lines = [json.dumps({"response": text, "label": label}) for text, label in (("please", "yes"), ("no", "no"))]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    before = sorted(tmp_path.iterdir())
    status, data, said = ab("judges", "tone", "--labels", "labels.jsonl")
    assert (status, data["version"], "has not been served" in said) == (0, None, True)
    assert sorted(tmp_path.iterdir()) == before


def test_what_waits_for_a_log_that_was_moved_away_goes_on_waiting(tmp_path: Path, ab: Ab) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/tone.db")
    journal = Journal(journal_of(tmp_path / "tone.yaml", "tone"))
    journal.append(("exposures", log.answer("control", "u1")))
    journal.close()
    log.engine.dispose()
    (tmp_path / "tone.db").rename(tmp_path / "away.db")
    assert ab("status", "tone")[0] == 2
    (tmp_path / "away.db").rename(tmp_path / "tone.db")
    assert ab("status", "tone")[1]["arms"]["control"]["answers"] == 1


def test_stop_works_without_the_vectors_and_once(log: Log, ab: Ab, tmp_path: Path) -> None:
    (tmp_path / "warm.safetensors").unlink()
    assert ab("stop", "tone", "--reason", "users complain")[1]["stopped"] == "users complain"
    assert ab("stop", "tone")[1] == {
        "experiment": "tone", "version": 1, "stopped": "users complain", "before": True, "versions": [],
    }  # fmt: skip
    assert ab("status", "tone")[1]["stopped"] == "users complain"


def test_stop_reaches_a_server_of_an_earlier_version_and_no_later_one(log: Log, ab: Ab, tmp_path: Path) -> None:
    """An edit was served and taken back: the version that runs is not the newest one."""
    engine, first = log.engine, log.experiment
    edited = trials.experiment(tmp_path, log=first.log, coverage=0.5)
    assert [state.register(engine, served) for served in (edited, first, first)] == [2, 1, 1]
    trials.experiment(tmp_path, log=first.log)
    assert ab("status", "tone")[1]["version"] == 1
    assert ab("report", "tone")[1]["version"] == 1
    assert ab("export", "tone", "-o", "all.jsonl")[0] == 0
    _, data, _ = ab("stop", "tone")
    assert (data["version"], data["versions"], data["before"]) == (1, [1, 2], False)
    assert [state.state_of(engine, "tone", version).stopped for version in (1, 2)] == ["by hand", "by hand"]
    again = state.register(engine, trials.experiment(tmp_path, log=first.log, coverage=0.4))
    assert state.state_of(engine, "tone", again) == state.State()
    assert ab("stop", "tone")[1]["versions"] == [3]


def test_status_takes_in_what_a_killed_server_left(log: Log, ab: Ab, tmp_path: Path) -> None:
    journal = Journal(journal_of(tmp_path / "tone.yaml", "tone"))
    for i in range(3):
        journal.append(("exposures", log.answer("control", f"u{i}")))
    journal.close()
    status, data, err = ab("status", "tone")
    assert (status, data["arms"]["control"]["units"]) == (0, 3)
    assert "3 rows that a killed server had left" in err


def units(count: int, arm: str, log: Log, good: int) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for i in range(count):
        rows.append(("exposures", log.answer(arm, f"{arm}{i}", f"{arm}{i}")))
        rows.append(("feedback", log.said(f"{arm}{i}", value=float(i < good))))
    return rows


def test_promote_prints_what_serves_and_bakes_the_winner(log: Log, ab: Ab) -> None:
    write(log.engine, [*units(400, "control", log, 100), *units(400, "friendly", log, 300)])
    status, data, _ = ab("promote", "tone", "friendly", "--model", "smollm2")
    assert (status, data.get("decision", data), data.get("forced")) == (0, "ship", False)
    assert data["commands"][0] == "steer serve smollm2 --vector warm=warm.safetensors --arm 'friendly=1.2*warm'"
    assert data["commands"][1].startswith("steer bake '1.2*warm' --model smollm2")
    assert ab("status", "tone")[1]["events"][-1]["reason"] == "friendly: ship"


def test_promote_takes_the_control_once_it_is_decided_against_the_others(log: Log, ab: Ab) -> None:
    write(log.engine, [*units(400, "control", log, 300), *units(400, "friendly", log, 100)])
    status, data, _ = ab("promote", "tone", "control")
    assert (status, data["decision"], data["forced"]) == (0, "selected", False)
    data = ab("promote", "tone", "friendly")[1]
    assert "roll back" in data["error"]
    assert "wait" not in data["hint"]


def test_promote_refuses_the_control_where_an_arm_is_undecided_or_better(log: Log, ab: Ab) -> None:
    write(log.engine, [*units(150, "control", log, 70), *units(150, "friendly", log, 75)])
    status, data, _ = ab("promote", "tone", "control")
    assert (status, "keep running (undecided: friendly)" in data["error"]) == (1, True)
    write(log.engine, [("feedback", log.said(f"friendly{i}", value=1.0)) for i in range(150)])
    status, data, _ = ab("promote", "tone", "control")
    assert (status, "not selected (better than the control: friendly)" in data["error"]) == (1, True)
    assert ab("promote", "tone", "control", "--force")[0] == 0


def test_promote_refuses_what_is_undecided_or_unhealthy(log: Log, ab: Ab) -> None:
    write(log.engine, [*units(150, "control", log, 70), *units(150, "friendly", log, 75)])
    status, data, _ = ab("promote", "tone", "friendly")
    assert (status, "keep running" in data["error"]) == (1, True)
    assert ab("promote", "tone", "friendly", "--force")[1]["forced"] is True
    write(log.engine, [("exposures", log.answer("control", f"more {i}")) for i in range(200)])
    assert "unhealthy" in ab("promote", "tone", "friendly")[1]["error"]
    assert "has no arm 'nobody'" in ab("promote", "tone", "nobody")[1]["error"]


def test_promote_refuses_a_file_that_was_edited_after_it_was_served(log: Log, ab: Ab, tmp_path: Path) -> None:
    trials.written(tmp_path, log=log.experiment.log.replace("+psycopg", ""), coverage=0.3)
    assert "was not served as" in ab("promote", "tone", "friendly")[1]["error"]


def test_sums_are_over_units_that_were_seen_in_one_arm(log: Log) -> None:
    log.write(
        "exposures",
        log.answer("control", "ann", "r1", response_tokens=10),
        log.answer("control", "ann", "r2", response_tokens=20),
        log.answer("control", "bob", "r3", response_tokens=30),
        log.answer("control", "moved", "r4"),
        log.answer("friendly", "moved", "r5"),
        log.answer("friendly", "cem", "r6", response_tokens=50),
        log.answer("friendly", "ramp", "r7", counted=False),
        log.answer("friendly", "dan", "r8", status=500, response_tokens=None),
    )
    conversation = hashed(log.experiment.salt, "bob" + "c", "conversation")
    log.write(
        "feedback",
        log.said("r1", value=1.0),
        log.said("r2", value=0.0),
        log.said(None, conversation=conversation, value=1.0),
        log.said("r6", value=1.0),
        log.said("r7", value=1.0),
        log.said("r6", metric="other", value=9.0),
        log.said("nothing", value=1.0),
        log.said("r6", comment="no value"),
    )
    with figures.analysis(log.engine, "tone", 1) as found:
        assert (found.units.by_arm, found.units.moved) == ({"control": 2, "friendly": 2}, 1)
        length = found.slices(Metric("response_tokens", "number"))
        assert {arm: figures.total(each) for arm, each in length.items()} == {
            "control": Sums(2, 45.0, 15.0**2 + 30.0**2), "friendly": Sums(1, 50.0, 2500.0),
        }  # fmt: skip
        by_response = found.slices(Metric("response_tokens", "number", per="response"))
        assert figures.total(by_response["control"]) == Sums(2, 60.0, 1800.0, 3.0, 5.0, 90.0)
        thumbs = found.slices(Metric("thumbs"))
        assert {arm: figures.total(each) for arm, each in thumbs.items()} == {
            "control": Sums(2, 1.5, 1.25), "friendly": Sums(1, 1.0, 1.0),
        }  # fmt: skip


def test_export_writes_every_answer_with_its_feedback(log: Log, ab: Ab, tmp_path: Path) -> None:
    log.write("exposures", *(log.answer("control", f"u{i}", f"r{i}") for i in range(1200)))
    log.write("exposures", log.answer("control", "u7", "r7 again", at=1.0))
    log.write("feedback", log.said("r7", value=1.0), log.said("r7", comment="<b>good</b>"))
    conversation = hashed(log.experiment.salt, "u7c", "conversation")
    log.write("feedback", log.said(None, conversation=conversation, value=0.0))
    assert ab("export", "tone", "-o", "rows.jsonl")[1]["written"] == 1201
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (row,) = [line for line in lines if line["response"] == "r7"]
    assert sorted(given.get("value", given.get("comment")) for given in row["feedback"] if "value" in given) == [1.0]
    assert len(row["feedback"]) == 2
    assert [given["value"] for given in lines[0]["feedback"]] == [0.0]  # once, with the first answer of a conversation


def test_demonstrations_are_training_data_for_bake(log: Log, ab: Ab, tmp_path: Path) -> None:
    prompt = json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    log.write(
        "exposures",
        log.answer("control", "u1", "r1", prompt=prompt, answer="What?"),
        log.answer("control", "u2", "r2"),
    )
    log.write(
        "feedback",
        log.said("r1", metric="better", demonstration="Hello, dear!", at=1.0),
        log.said("r2", metric="better", demonstration="Hi!", prompt=json.dumps("Good day"), at=2.0),
        log.said("r2", metric="better", demonstration="no prompt", at=3.0),
    )
    _, data, err = ab("export", "tone", "--demonstrations", "-o", "pairs.jsonl")
    assert (data["written"], data["left_out"]) == (1, 2)
    assert "2 demonstrations are left out" in err
    _, data, _ = ab("export", "tone", "--demonstrations", "--as", "data", "-o", "data.jsonl")
    assert (data["written"], data["left_out"]) == (2, 1)
    pairs = read(pairs=tmp_path / "pairs.jsonl")
    assert [example.completion for example in pairs.positive] == ["Hello, dear!"]
    assert [example.completion for example in pairs.negative] == ["What?"]
    assert json.loads((tmp_path / "data.jsonl").read_text().splitlines()[1]) == {
        "messages": [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": "Hi!"}]
    }


@pytest.mark.parametrize("unit", ["ann", "'; DELETE FROM exposures; --", "%"])
def test_forget_removes_the_rows_of_one_person(log: Log, ab: Ab, unit: str) -> None:
    log.write(
        "exposures", log.answer("control", unit, "r1"), log.answer("control", unit, "r2"),
        log.answer("friendly", "bob", "r3"),
    )  # fmt: skip
    log.write("feedback", log.said("r1", value=1.0), log.said("r3", value=1.0))
    assert ab("forget", "tone", unit)[1] == {"experiment": "tone", "answers": 2, "feedback": 1}
    with log.engine.connect() as connection:
        assert connection.execute(select(EXPOSURES.c.response)).scalars().all() == ["r3"]
        assert connection.execute(select(FEEDBACK.c.response)).scalars().all() == ["r3"]
    assert ab("forget", "tone", unit)[1]["answers"] == 0


def test_what_waits_in_a_running_server_is_forgotten_too(log: Log, ab: Ab, tmp_path: Path) -> None:
    """Its journal is under its lock, so that nobody else may take the rows out of it."""
    log.write("exposures", log.answer("control", "ann", "r1"))
    running = Journal(journal_of(log.experiment.file, "tone"))
    later = log.answer("control", "ann", "r4", at=time.time() + 3600)
    for row in (log.answer("control", "ann", "r2"), log.answer("control", "bob", "r3"), later):
        running.append(("exposures", row))
    for response in ("r1", "r2", "r3", "r4"):
        running.append(("feedback", log.said(response, value=1.0)))
    assert ab("forget", "tone", "ann")[1] == {"experiment": "tone", "answers": 1, "feedback": 0}
    rows, _ = running.read(4)  # what the server does next, in two batches
    written(log.engine, rows)
    written(log.engine, running.read(100)[0])
    with log.engine.connect() as connection:
        assert set(connection.execute(select(EXPOSURES.c.response)).scalars()) == {"r3", "r4"}
        assert set(connection.execute(select(FEEDBACK.c.response)).scalars()) == {"r3", "r4"}
        reasons = " ".join(connection.execute(select(EVENTS.c.reason)).scalars())
    assert hashed(log.experiment.salt, "ann") not in reasons  # the mark is a hash of it
    running.close()


def test_a_user_who_is_no_unit_can_t_be_forgotten_and_the_next_step_is_named(log: Log, ab: Ab) -> None:
    log.write("exposures", log.answer("control", "conversation 1", "r1"))
    status, data, said = ab("forget", "tone", "ann")
    assert (status, data["answers"]) == (0, 0)
    assert "does not hold users" in said
    assert "X-Steer-Conversation" in said


@pytest.mark.parametrize("written_as", ["müller", "mÃ¼ller"])
def test_an_id_in_any_letters_is_forgotten_also_as_an_earlier_release_read_it(
    log: Log, ab: Ab, written_as: str
) -> None:
    log.write("exposures", log.answer("control", written_as, "r1"))
    log.write("feedback", log.said("r1", value=1.0))
    status, data, said = ab("forget", "tone", "müller")
    assert (status, data["answers"], data["feedback"], "warning" in said) == (0, 1, 1, False)


@pytest.mark.parametrize(
    ("unit", "sent"), [("user", "in the field `user`"), ({"header": "X-Id"}, "in the header X-Id")]
)
def test_who_is_not_in_the_log_is_never_forgotten_in_silence(tmp_path: Path, ab: Ab, unit: Any, sent: str) -> None:
    Log(tmp_path, f"sqlite:///{tmp_path}/tone.db", unit=unit)
    status, data, said = ab("forget", "tone", "nobody")
    assert (status, data["answers"]) == (0, 0)
    assert "holds nothing of 'nobody'" in said
    assert sent in said


def test_times_are_in_utc(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    assert run(["ab", "status", "tone"]) == 0
    monkeypatch.undo()
    time.tzset()
    printed = capsys.readouterr().out
    assert time.strftime("%Y-%m-%d %H:", time.gmtime()) in printed
    assert " UTC" in printed


def test_what_is_forgotten_is_not_in_the_file_any_more(tmp_path: Path, ab: Ab) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/tone.db")
    log.write("exposures", log.answer("control", "ann", "r1", answer="a secret of Ann"))
    assert ab("forget", "tone", "ann")[1]["answers"] == 1
    content = b"".join(file.read_bytes() for file in tmp_path.glob("tone.db*"))
    assert b"a secret of Ann" not in content


def test_what_a_log_holds_is_no_markup_of_the_terminal(log: Log, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    log.write("feedback", log.said("r", metric="[red]\x1b[31m<script>", comment="\x1b]0;x\x07"))
    assert run(["ab", "status", "tone"]) == 0
    assert "\x1b" not in capsys.readouterr().out
