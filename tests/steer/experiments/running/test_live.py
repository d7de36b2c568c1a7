"""A running experiment: sticky arms, versions, the ramp, stops and breaches, over both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trials
from sqlalchemy import select

from steer.experiments.assignment import Decision, Identity
from steer.experiments.running import counted, guardrails, live
from steer.experiments.running.conversations import Conversations
from steer.experiments.running.live import Live
from steer.experiments.storage import state
from steer.experiments.storage.database import write
from steer.experiments.storage.tables import EXPOSURES

ANSWER = {"status": 200, "at": 1.0, "response_tokens": 20, "latency": 0.5, "repetition": 0.0, "refusal": False}
Start = Callable[..., Live]


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Start]:
    """Starts servers of an experiment over one log."""
    started: list[Live] = []

    def begin(**changes: Any) -> Live:
        experiment = trials.experiment(tmp_path, log=url.replace("+psycopg", ""), **changes)
        started.append(live.begin(experiment))
        return started[-1]

    yield begin
    for each in started:
        each.end()


def conversation(name: str, *, begins: bool = False) -> Identity:
    return Identity(name, "conversation", name, begins)


def answered(running: Live, decision: Decision, **more: Any) -> None:
    running.record(decision, {**ANSWER, "at": time.time(), **more})


def arms(running: Live, names: list[str]) -> dict[str, tuple[str, str]]:
    found = {name: running.decide(conversation(name)) for name in names}
    return {name: (decision.arm.name, decision.reason) for name, decision in found.items()}


NAMES = [f"conversation {i}" for i in range(200)]


def test_the_same_unit_has_the_same_arm_in_every_server_and_after_restarts(start: Start) -> None:
    first = arms(start(), NAMES)
    assert arms(start(), NAMES) == first
    assert {arm for arm, _ in first.values()} == {"control", "friendly"}


def test_an_answer_is_one_row(start: Start) -> None:
    running = start()
    decision = running.decide(conversation("ann"))
    answered(running, decision, response="chat-1")
    assert running.writer.flush(10)
    with running.engine.connect() as connection:
        (row,) = connection.execute(select(EXPOSURES)).mappings().all()
    assert (row["version"], row["arm"], row["reason"], row["counted"]) == (1, decision.arm.name, "assigned", True)
    assert row["digest"] == decision.arm.digest
    assert "ann" not in repr(dict(row))
    assert row["unit"] != row["conversation"]


def test_answers_have_ids_of_their_own_over_servers_and_rise_in_each(start: Start) -> None:
    ids = [[server.new_id() for _ in range(300)] for server in (start(), start())]
    assert ids == [sorted(each) for each in ids]
    assert len({*ids[0], *ids[1]}) == 600
    assert {len(each) for each in ids[0]} == {32}


def test_a_forced_arm_does_not_count_and_moves_nobody(start: Start) -> None:
    running = start()
    before = running.decide(conversation("ann"))
    forced = running.decide(conversation("ann"), "control" if before.arm.name != "control" else "friendly")
    assert (forced.reason, forced.counted) == ("forced", False)
    assert running.decide(conversation("ann")) == before
    with pytest.raises(KeyError):
        running.decide(conversation("ann"), "nobody")


def test_a_stop_reaches_the_other_server_within_a_second(start: Start) -> None:
    running, other = start(), start()
    other.start()
    begun = arms(other, NAMES)
    assert any(arm == "friendly" for arm, _ in begun.values())
    write(running.engine, [("events", state.event("tone", 1, state.STOPPED, reason="by hand"))])
    end = time.monotonic() + 10  # a second, on a machine that is not busy
    while not other.state.stopped:
        assert time.monotonic() < end
        time.sleep(0.02)
    new = arms(other, [f"new {i}" for i in range(50)])
    assert set(new.values()) == {("control", "stopped")}
    assert arms(other, NAMES) == begun  # conversations that have begun keep their arms


def test_a_check_that_fails_is_tried_again_and_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    running, done = start(), threading.Event()

    def check() -> None:
        if not caplog.records:
            raise ArithmeticError("no such figure")
        done.set()

    running.end()
    running.ending.clear()
    thread = threading.Thread(target=running._repeat, args=(0.01, check), daemon=True)
    thread.start()
    assert done.wait(5)
    running.ending.set()
    thread.join()
    assert "experiment tone: a check failed" in caplog.text
    assert "no such figure" in caplog.text


def test_servers_of_one_log_judge_the_guardrails_by_the_answers_of_all(start: Start) -> None:
    """None of them has answers of both arms, and each counts its own once."""
    running, other = start(), start()
    found: dict[str, list[Identity]] = {"control": [], "friendly": []}
    for name in NAMES:
        found[running.decide(conversation(name)).arm.name].append(conversation(name))
    for identity in found["control"]:
        answered(running, running.decide(identity))
    for identity in found["friendly"]:
        answered(other, other.decide(identity), status=500)
    assert running.writer.flush(10)
    assert other.writer.flush(10)
    for each in (running, other):
        each.check()
        assert not each.state.stopped
        each.poll()
        each.count()
        assert {arm: counts.answers for arm, counts in each.guard.arms.items()} == {
            arm: len(identities) for arm, identities in found.items()
        }
        each.check()
        assert each.state.stopped.startswith("arm friendly is outside of the guardrail error_rate"), each.state


def test_a_server_reads_the_answers_of_others_and_not_its_own_again(start: Start) -> None:
    """Also when a stop is read: what it has answered itself it remembers, and a busy log has many thousands of it."""
    one, other = start(), start()
    for name in NAMES:
        answered(one, one.decide(conversation(name)), response=f"chat {name}")
    for name in NAMES[:7]:
        answered(other, other.decide(conversation(f"other {name}")), response=f"other {name}")
    assert one.writer.flush(10)
    assert other.writer.flush(10)
    read = Conversations()
    read.restore(one.engine, one.experiment.name, one.identity)
    assert len(read.begun) == len(read.responses) == 7
    rows = list(counted.in_log(one.engine, one.experiment.name, one.version, 0, 0.0, one.identity))
    assert len(rows) == 7
    other.stop("enough")
    assert other.writer.flush(10)
    one.poll()
    assert one.state.stopped == "enough"
    assert {one.decide(conversation(f"other {name}")).reason for name in NAMES[:7]} == {"assigned"}
    assert one.decide(conversation("new")).reason == "stopped"
    assert sum(arm.answers for arm in one.guard.arms.values()) == len(NAMES) + 7


def test_a_conversation_that_is_known_by_its_first_message_begins_anew_without_an_answer(start: Start) -> None:
    running = start()
    name = next(name for name in NAMES if running.decide(conversation(name, begins=True)).arm.name == "friendly")
    running.stop("by hand")
    assert running.decide(conversation(name)).arm.name == "friendly"  # goes on
    assert running.decide(conversation(name, begins=True)).arm.name == "control"  # begins
    assert running.decide(conversation(name)).arm.name == "control"


def test_a_conversation_keeps_its_arm_over_restarts_in_an_experiment_that_was_stopped(start: Start) -> None:
    running = start()
    names = [name for name in NAMES if running.decide(conversation(name)).arm.name == "friendly"][:5]
    for name in names:
        answered(running, running.decide(conversation(name)), response=f"chat {name}")
    running.stop("by hand")
    assert running.writer.flush(10)
    again = start()
    assert again.state.stopped == "by hand"
    assert set(arms(again, names).values()) == {("friendly", "assigned")}
    assert arms(again, ["new"]) == {"new": ("control", "stopped")}


def test_a_long_conversation_keeps_its_arm_a_day_after_a_restart(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running, now = start(), time.time()
    decision = running.decide(conversation("ann"))
    for hours in (23, 1):
        running.record(decision, {**ANSWER, "at": now - 3600 * hours})
    assert running.writer.flush(10)
    restarted = start()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 3600)
    assert restarted.conversations.find(decision.conversation) is not None


@pytest.mark.parametrize("known_first", [True, False])
def test_a_conversation_keeps_its_arm_where_its_user_is_known_only_sometimes(start: Start, known_first: bool) -> None:
    running, reasons = start(), set()
    for i in range(20):
        named, alone = Identity(f"user {i}", "user", f"c{i}", False), conversation(f"c{i}")
        first, second = (named, alone) if known_first else (alone, named)
        began, later = running.decide(first), running.decide(second)
        assert began.arm == later.arm
        reasons.add((began.reason, later.reason, later.counted))
    assert reasons == {("assigned", "continued", False)}


def test_an_edit_is_a_new_version_in_which_old_conversations_do_not_count(start: Start) -> None:
    first = start()
    decision = first.decide(conversation("ann"))
    answered(first, decision)
    assert first.writer.flush(10)
    second = start(metric={"name": "stars", "kind": "number"})
    assert (first.version, second.version) == (1, 2)
    going_on = second.decide(conversation("ann"))
    assert (going_on.arm.name, going_on.reason, going_on.counted) == (decision.arm.name, "continued", False)
    assert second.decide(conversation("new")).counted


RAMP = {"ramp": ["10%", "50%"], "ramp_responses": 40}


def grow(running: Live, names: list[str], **measured: Any) -> None:
    for name in names:
        answered(running, running.decide(conversation(name)), **measured)


def test_a_ramp_goes_on_while_every_arm_is_inside_and_its_answers_do_not_count(start: Start) -> None:
    running = start(**RAMP, guardrails={"error_rate": 0.2})
    names = [f"unit {i}" for i in range(4000)]
    stages, counted = [], []
    for i in range(0, len(names), 500):
        before = running.state.stage
        grow(running, names[i : i + 500], latency=0.5)
        stages.append(running.state.stage)
        running.stepped = 0.0
        running.poll()
        assert running.state.stage - before <= 1
    assert (stages[0], running.state.stage) == (0, 2)
    assert running.writer.flush(20)
    with running.engine.connect() as connection:
        rows = connection.execute(select(EXPOSURES.c.stage, EXPOSURES.c.counted, EXPOSURES.c.reason)).all()
    counted = {stage for stage, counts, _ in rows if counts}
    assert counted == {2}
    assert {reason for stage, counts, reason in rows if not counts and stage == 2} == set()
    assert state.state_of(running.engine, "tone", 1).stage == 2
    # Conversations of the ramp keep their arms, and do not count.
    again = [running.decide(conversation(name)) for name in names[:500]]
    assert not any(decision.counted for decision in again)
    assert {decision.reason for decision in again} == {"outside", "continued"}


def test_a_ramp_waits_while_too_little_is_known(start: Start) -> None:
    running = start(**RAMP)
    grow(running, NAMES)
    running.stepped = 0.0
    running.poll()
    assert running.state.stage == 0


def test_what_holds_a_ramp_that_has_its_answers_is_noted_once(start: Start) -> None:
    limits = {"refusals": 0.001, "error_rate": 0.2, "latency_p95": None}
    running = start(ramp=["50%"], ramp_responses=30, guardrails=limits)
    grow(running, [f"unit {i}" for i in range(300)])
    for _ in range(2):
        running.stepped = 0.0
        running.poll()
    assert running.writer.flush(20)
    events = state.events_of(running.engine, "tone", 1)
    (held,) = [each["reason"] for each in events if each["kind"] == state.HELD]
    assert held == "at coverage 0.5, not surely inside yet: refusals (friendly)"


@pytest.mark.parametrize(
    ("guardrail", "bad"),
    [
        ("error_rate", {"status": 500}),
        ("refusals", {"refusal": True}),
        ("repetition", {"repetition": 0.9}),
        ("length_ratio", {"response_tokens": 90}),
        ("length_ratio", {"response_tokens": 4}),
        ("latency_p95", {"latency": 2.0}),
    ],
)
def test_a_breach_stops_the_experiment_at_once(start: Start, guardrail: str, bad: dict[str, Any]) -> None:
    running = start()
    for i in range(400):
        decision = running.decide(conversation(f"unit {i}"))
        wobble = {"response_tokens": 20 + i % 3, "repetition": 0.01 * (i % 2), "latency": 0.5 + 0.01 * (i % 5)}
        answered(running, decision, **{**wobble, **(bad if decision.arm.name == "friendly" else {})})
    running.check()
    assert guardrail in running.state.stopped
    assert set(arms(running, [f"new {i}" for i in range(20)]).values()) == {("control", "stopped")}
    assert running.writer.flush(10)
    assert guardrail in state.state_of(running.engine, "tone", 1).stopped


def test_a_breach_that_only_warns_is_noted_once(start: Start) -> None:
    running = start(on_breach="warn")
    for i in range(300):
        decision = running.decide(conversation(f"unit {i}"))
        answered(running, decision, status=500 if decision.arm.name == "friendly" else 200)
        running.check()
    assert running.writer.flush(10)
    assert not running.state.stopped
    kinds = [event["kind"] for event in state.events_of(running.engine, "tone", 1)]
    assert kinds.count(state.WARNED) == 1


def test_arms_that_do_not_differ_breach_nothing(start: Start) -> None:
    running = start()
    for i in range(600):
        answered(running, running.decide(conversation(f"unit {i}")), latency=0.5 + 0.01 * (i % 7),
                 response_tokens=20 + i % 9, status=500 if i % 50 == 0 else 200)  # fmt: skip
        running.check()
    assert not running.state.stopped


@pytest.mark.parametrize("status", [499, 400, 413])
def test_clients_that_go_away_or_are_refused_say_nothing_about_an_arm(start: Start, status: int) -> None:
    running = start()
    for i in range(200):
        decision = running.decide(conversation(f"unit {i}"))
        answered(running, decision, status=status if decision.arm.name == "friendly" else 200)
    running.check()
    assert not running.state.stopped


def test_a_restart_restores_the_latest_latencies(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardrails, "LATENCIES", 200)
    running, now = start(), time.time()
    decision = running.decide(conversation("ann"))
    for i in range(700):
        running.record(decision, {**ANSWER, "at": now + i, "latency": float(i)})
    assert running.writer.flush(10)
    assert [latency for _, _, latency in start().guard.latest] == [500.0 + i for i in range(200)]


def test_damaged_lines_of_a_killed_server_are_noted_in_the_log(start: Start, tmp_path: Path) -> None:
    folder = live.journal_folder(trials.experiment(tmp_path))
    folder.mkdir()
    (folder / "killed.jsonl").write_text('["events", {"id"')
    running = start()
    assert running.writer.flush(10)
    found = state.events_of(running.engine, "tone", 1)
    assert [event["count"] for event in found if event["kind"] == state.DROPPED] == [1]
