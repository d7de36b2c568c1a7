"""Adaptive weights over both databases: epochs that several servers agree on, and units that never change their arm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trials
from sqlalchemy import event, select

from steer.experiments import exports
from steer.experiments.assignment import Identity
from steer.experiments.running import adaptive, allocating, live
from steer.experiments.running.live import Live
from steer.experiments.specification import Metric
from steer.experiments.storage import epochs, state
from steer.experiments.storage.database import open_log, write
from steer.experiments.storage.figures import analysis
from steer.experiments.storage.tables import EXPOSURES

ARMS = {"control": {}, "friendly": {"steer": "1.2*warm"}, "more": {"steer": "2*warm"}}
LONGER = {"control": 20, "friendly": 30, "more": 20}  # tokens of an answer
Start = Callable[..., Live]


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Start]:
    """Starts servers of an adaptive experiment over one log of each database."""
    yield from servers(tmp_path, url)


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Start]:
    """The same over SQLite, for what does not depend on the database."""
    yield from servers(tmp_path, f"sqlite:///{tmp_path}/log.db")


def servers(tmp_path: Path, url: str) -> Iterator[Start]:
    started: list[Live] = []

    def begin(**changes: Any) -> Live:
        values = {
            "arms": ARMS, "unit": "user", "metric": {"name": "response_tokens", "smallest_effect": 2, "spread": 5},
            "allocation": {"method": "track-and-stop", "smallest_share": 0.1, "every": 1}, "on_breach": "warn",
        }  # fmt: skip
        started.append(
            live.begin(trials.experiment(tmp_path, log=url.replace("+psycopg", ""), **{**values, **changes}))
        )
        return started[-1]

    yield begin
    for each in started:
        each.end()


def user(name: str, conversation: str = "") -> Identity:
    return Identity(name, "user", conversation or f"{name}'s", False)


def serve(running: Live, names: list[str], lengths: dict[str, int] = LONGER, flush: bool = True) -> dict[str, str]:
    """Answer each user once, with a new conversation; return their arms."""
    found = {}
    for number, name in enumerate(names):
        decision = running.decide(user(name, f"{name} at {time.monotonic_ns()}"))
        found[name] = decision.arm.name
        length = lengths[decision.arm.name] + number % 7
        running.record(decision, {"status": 200, "at": time.time(), "response_tokens": length, "latency": 0.5})
    if flush:
        assert running.writer.flush(20)
    return found


def adapt(running: Live) -> None:
    """Let it be time for the next epoch."""
    assert running.adaptive is not None
    running.adaptive.adapted, running.adaptive.every = 0.0, 0
    running.adapt()


def epoch_of(running: Live) -> epochs.Epoch:
    assert running.adaptive is not None
    return running.adaptive.epoch


FIRST, SECOND = [f"user {i}" for i in range(390)], [f"later user {i}" for i in range(150)]
CLOSE = {"control": 20, "friendly": 21, "more": 20}


def test_weights_follow_the_metric_until_an_arm_is_selected(lite: Start) -> None:
    running = lite()
    serve(running, FIRST[:200])
    adapt(running)
    assert epoch_of(running).number == 0  # too few units
    serve(running, FIRST[200:])
    adapt(running)
    number, weights, reason, selected, at = epoch_of(running)
    assert (number, selected, weights["friendly"]) == (1, "friendly", 0.8)
    assert sum(weights.values()) == pytest.approx(1)
    assert "no arm is better by more than 2" in reason
    assert at > time.time() - 60
    arms = list(serve(running, SECOND).values())
    assert arms.count("friendly") > 100
    adapt(running)
    assert epoch_of(running).number == 1  # a selection stays


def test_the_better_arm_may_be_that_with_less(lite: Start) -> None:
    metric = {"name": "response_tokens", "better": "lower", "smallest_effect": 2}
    running = lite(metric=metric)
    serve(running, FIRST, {"control": 30, "friendly": 30, "more": 20})
    adapt(running)
    assert epoch_of(running).selected == "more"


def test_a_metric_that_does_not_vary_moves_no_weight(lite: Start) -> None:
    running = lite(metric={"name": "latency", "smallest_effect": 0.1})
    serve(running, FIRST)
    adapt(running)
    assert epoch_of(running).number == 0


def test_a_unit_keeps_its_arm_over_epochs_restarts_and_servers(start: Start) -> None:
    running = start(metric={"name": "response_tokens", "smallest_effect": 0.5})
    before = serve(running, FIRST, CLOSE)
    adapt(running)
    assert epoch_of(running).number == 1
    assert epoch_of(running).weights["more"] < 0.3
    assert serve(running, FIRST[:100], CLOSE) == {name: before[name] for name in FIRST[:100]}
    again = start(metric={"name": "response_tokens", "smallest_effect": 0.5})
    assert again.adaptive is not None
    assert epoch_of(again) == epoch_of(running)
    for name in FIRST[:60]:
        unit = again.adaptive.unknown(name, 1.0)
        assert unit is not None
        again.adaptive.look_up(unit)
        assert again.adaptive.unknown(name, 1.0) is None
        decision = again.decide(user(name, "a new conversation"))
        assert (decision.arm.name, decision.epoch, decision.counted) == (before[name], 0, True)
    assert {again.decide(user(name)).epoch for name in SECOND} == {1}


def test_what_the_log_knows_of_a_unit_is_found_without_the_answers_of_others(lite: Start) -> None:
    running = lite()
    assert running.adaptive is not None
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, values: Any, *_: Any) -> None:
        plans.extend(row[3] for row in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", values))

    event.listen(running.engine, "before_cursor_execute", explain)
    running.adaptive.look_up("nobody")
    event.remove(running.engine, "before_cursor_execute", explain)
    assert any("exposures_by_unit (unit=?)" in plan for plan in plans)


def test_a_conversation_that_goes_on_keeps_its_epoch(lite: Start) -> None:
    running = lite()
    first = {name: running.decide(user(name)) for name in FIRST[:50]}
    assert running.adaptive is not None
    running.adaptive.epoch = epochs.Epoch(1, {"control": 0.1, "friendly": 0.1, "more": 0.8})
    running.adaptive.known.clear()
    assert {name: running.decide(user(name)) for name in FIRST[:50]} == first


def test_servers_that_adapt_at_once_begin_one_epoch_and_follow_it(start: Start) -> None:
    running, other = start(), start()
    serve(running, FIRST)
    following = [allocating.following(each.engine, each.experiment, 1) for each in (running, other)]
    assert following[0] is not None
    assert following[0] == following[1]
    begun = [epochs.begin(each.engine, "tone", 1, following[0]) for each in (running, other, running)]
    assert begun == [True, False, False]
    for each in (running, other):
        each.poll()
        assert epoch_of(each).number == 1
        adapt(each)
    assert len(epochs.epochs_of(running.engine, "tone", 1)) == 1
    assert epoch_of(running) == epoch_of(other)


def test_one_of_several_servers_begins_an_epoch_that_all_want_at_once(url: str) -> None:
    engines = [open_log(url) for _ in range(4)]
    begun: list[tuple[bool, int]] = []

    def begin(number: int) -> None:
        epoch = epochs.Epoch(1, {"control": number / 10, "friendly": 1 - number / 10})
        begun.append((epochs.begin(engines[number], "tone", 1, epoch), number))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for one, number in begun if one]
    (found,) = epochs.epochs_of(engines[0], "tone", 1)
    assert (len(begun), found.weights["control"]) == (4, winner / 10)
    for engine in engines:
        engine.dispose()


def test_neither_the_ramp_nor_a_stopped_experiment_adapts(lite: Start) -> None:
    running = lite(ramp=["99%"])
    serve(running, FIRST)
    adapt(running)
    assert epoch_of(running).number == 0
    running.state = running.state._replace(stage=1)
    adapt(running)
    assert epoch_of(running).number == 0  # what was answered during the ramp is no reason
    before = {name: running.decide(user(name, "another")) for name in FIRST}
    assert {(each.epoch, each.counted) for each in before.values() if each.reason == "assigned"} == {(0, True)}
    serve(running, SECOND + FIRST)
    running.stop("by hand")
    adapt(running)
    assert epoch_of(running).number == 0
    assert {running.decide(user(f"new {i}")).epoch for i in range(20)} == {None}


def test_wrong_shares_move_no_weight(lite: Start) -> None:
    running = lite()
    names = [name for name in FIRST + SECOND if running.decide(user(name)).arm.name != "control"]
    few = [name for name in FIRST + SECOND if name not in names][:105]
    serve(running, [*names, *few])
    adapt(running)
    assert epoch_of(running).number == 0
    with analysis(running.engine, "tone", 1) as found:
        assert allocating.shares_p(found, running.experiment, []) < 0.001


def test_every_answer_names_its_epoch_and_only_those_that_take_part(lite: Start) -> None:
    running = lite(coverage=0.5)
    serve(running, FIRST[:60])
    running.record(running.decide(user("tester"), "more"), {"status": 200, "at": time.time()})
    assert running.writer.flush(10)
    with running.engine.connect() as connection:
        rows = connection.execute(select(EXPOSURES.c.reason, EXPOSURES.c.epoch).distinct()).all()
    assert set(map(tuple, rows)) == {("assigned", 0), ("outside", None), ("forced", None)}
    assert {row.get("epoch") for row in exports.rows(running.engine, "tone")} == {0, None}


def test_the_log_is_not_asked_about_units_that_take_no_part(lite: Start) -> None:
    running = lite(coverage=0.5)
    assert running.adaptive is not None
    asked = {name for name in FIRST[:60] if running.adaptive.unknown(name, running.coverage) is not None}
    assert asked == {name for name in FIRST[:60] if running.decide(user(name)).reason == "assigned"}
    assert 0 < len(asked) < 60


def test_a_fixed_allocation_has_no_epochs(lite: Start) -> None:
    running = lite(allocation=None)
    assert running.adaptive is None
    assert running.decide(user("ann")).epoch is None
    assert "allocation" not in running.experiment.frozen()


def test_units_are_counted_by_their_epochs_also_when_someone_is_forgotten(lite: Start) -> None:
    running = lite()
    serve(running, FIRST)
    adapt(running)
    serve(running, FIRST[:20] + SECOND)

    def units() -> dict[int, int]:
        with analysis(running.engine, "tone", 1) as found:
            return {epoch: sum(arms.values()) for epoch, arms in found.by_epoch().items()}

    assert units() == {0: 390, 1: 150}
    for name in (FIRST[0], SECOND[0], SECOND[1]):
        exports.forget(running.engine, "tone", running.experiment.salt, name)
    assert units() == {0: 389, 1: 148}
    with analysis(running.engine, "tone", 1) as found:
        assert allocating.shares_p(found, running.experiment, epochs.epochs_of(running.engine, "tone", 1)) > 0.001
        assert allocating.shares_p(found, running.experiment, []) > 0.001  # of epochs that are not known, nothing


def test_a_metric_per_response_is_compared_by_its_ratio(lite: Start) -> None:
    metric = {"name": "response_tokens", "per": "response", "smallest_effect": 2}
    running = lite(metric=metric)
    serve(running, FIRST + FIRST[:200])
    with analysis(running.engine, "tone", 1) as found:
        known = allocating.estimates(found, running.experiment)
    assert running.experiment.metric == Metric("response_tokens", "number", smallest_effect=2, per="response")
    assert known["friendly"].mean == pytest.approx(33, abs=0.5)
    adapt(running)
    assert epoch_of(running).selected == "friendly"


def test_the_memory_of_units_is_bounded(lite: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = lite()
    assert running.adaptive is not None
    running.adaptive.most = 10
    arms = {name: running.decide(user(name)).arm.name for name in FIRST[:30]}
    assert len(running.adaptive.known) == 10
    assert adaptive.MOST > 10
    assert arms[FIRST[29]] == running.decide(user(FIRST[29], "another")).arm.name


def test_a_stop_is_followed_by_servers_with_adaptive_weights_too(lite: Start) -> None:
    running = lite()
    write(running.engine, [("events", state.event("tone", 1, state.STOPPED, reason="by hand"))])
    running.poll()
    assert running.decide(user("ann")).reason == "stopped"
    assert running.summary()["epoch"]["number"] == 0
