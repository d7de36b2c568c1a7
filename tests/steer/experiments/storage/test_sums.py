"""What the log has added up is what its rows add up to: in both databases, whatever is written, repeated or removed."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import Double, delete, literal, select
from trials import Log

from steer.experiments import exports
from steer.experiments.overview import overview
from steer.experiments.specification import Metric
from steer.experiments.statistics import moments
from steer.experiments.storage import figures, sums, unit_sums
from steer.experiments.storage.database import open_log, write, writing
from steer.experiments.storage.figures import Analysis, analysis
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK

METRICS = [
    Metric(name, "number", per=per) for name, per in (
        ("response_tokens", "unit"), ("latency", "unit"), ("refusal", "response"), ("thumbs", "unit"),
        ("thumbs", "response"), ("stars", "unit"),
    )
]  # fmt: skip


def answers(log: Log, count: int, seed: int) -> list[dict[str, Any]]:
    """Random answers: repeated, forced, outside, during the ramp, failed, of units in two arms, out of order."""
    chosen, made = random.Random(seed), []
    for _ in range(count):
        unit = chosen.randrange(25)
        arm = ("control", "friendly")[(unit + (chosen.random() < 0.02)) % 2]
        reason = chosen.choices(("assigned", "forced", "outside", "continued"), (8, 1, 1, 1))[0]
        some = {"latency": chosen.random(), "repetition": chosen.random() / 8, "refusal": chosen.random() < 0.3,
                "response_tokens": chosen.randrange(99)}  # fmt: skip
        row = log.answer(
            arm, f"u{unit}", f"r{chosen.randrange(2 * count)}", reason=reason, at=1e9 + 1e4 * chosen.random() ** 3,
            counted=reason == "assigned" and chosen.random() < 0.8, epoch=chosen.choice((None, 0, 1)),
            status=chosen.choice((200, 200, 200, 200, 500, 499, 400)),
            **{name: value if chosen.random() < 0.8 else None for name, value in some.items()},
        )  # fmt: skip
        made += [row] * (1 + (chosen.random() < 0.05))
    return made


def feedback(log: Log, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Random feedback: repeated, changed with its key, of equal age, about conversations, unknown; and comments."""
    chosen, given = random.Random(seed), []
    for row in rows:
        for _ in range(chosen.choice((0, 0, 1, 1, 3))):
            at, metric = 1e9 + chosen.randrange(6), chosen.choice(("thumbs", "thumbs", "stars"))
            given.append(log.said(row["response"], value=chosen.random(), at=at, metric=metric))
        if chosen.random() < 0.1:
            given.append(log.said(None, conversation=row["conversation"], value=chosen.random(), at=1e9))
            given.append(log.said(row["response"], comment="good", metric="thumbs"))
    given += [{**each, "value": 0.5} for each in given if chosen.random() < 0.1]
    return [*given, log.said("none", value=1.0, mark="unknown")]


def rows_of(log: Log) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The answers that count, and the feedback in order."""
    with log.engine.connect() as connection:
        rows, given = ([dict(row) for row in connection.execute(select(t)).mappings()] for t in (EXPOSURES, FEEDBACK))
    return [row for row in rows if row["counted"]], sorted(given, key=lambda piece: (piece["at"], piece["id"]))


def plain(rows: list[dict[str, Any]], given: list[dict[str, Any]], metric: Metric) -> dict[str, moments.Sums]:
    """The sums of a metric by arm, from all rows one after the other."""
    arms: dict[str, set[str]] = {}
    values: dict[str, list[float]] = {}
    for row in rows:
        arms.setdefault(row["unit"], set()).add(row["arm"])
        if metric.source == "server" and row["status"] == 200 and row[metric.name] is not None:
            values.setdefault(row["unit"], []).append(float(row[metric.name]))
    newest: dict[tuple[str, str], float] = {}
    for piece in given:
        if metric.source == "feedback" and piece["metric"] == metric.name and piece["value"] is not None:
            kind = "response" if piece["response"] is not None else "conversation"
            newest[kind, piece[kind]] = piece["value"]
    for (kind, name), value in newest.items():
        units = [row["unit"] for row in rows if row[kind] == name]
        if units:
            values.setdefault(min(units), []).append(value)
    found: dict[str, tuple[list[float], list[float]]] = {"control": ([], []), "friendly": ([], [])}
    for unit, each in sorted(values.items()):
        if len(arms[unit]) == 1:
            y, x = found[min(arms[unit])]
            y.append(sum(each) if metric.per == "response" else sum(each) / len(each))
            x.append(float(len(each)) if metric.per == "response" else 0.0)
    return {arm: moments.sums_of(*each) for arm, each in found.items()}


def state_of(found: Analysis) -> dict[str, Any]:
    """Everything that a report reads."""
    return {
        "units": found.units.by_arm, "moved": found.units.moved, "epochs": found.by_epoch(),
        "times": [found.began, found.ended],
        "tallies": {
            (tally.arm, tally.reason, tally.counted): [*tally[3:10], *tally.tokens, *tally.repetition]
            for tally in found.tallies
        },
        "sums": [[*figures.total(each)] for metric in METRICS for _, each in sorted(found.slices(metric).items())],
        "before": {
            name: {arm: [*each] for arm, each in by_arm.items()}
            for name, by_arm in found.before(METRICS[:3]).items()
        },
        "values": [found.first_values(metric, "friendly", 9) for metric in METRICS[1:4]],
    }  # fmt: skip


def assert_right(log: Log) -> None:
    """The sums are what the rows give one after the other, and what adding them up anew gives."""
    with analysis(log.engine, "tone", 1) as found:
        kept, all_rows = state_of(found), rows_of(log)
        for metric in METRICS:
            expected = plain(*all_rows, metric)
            for arm, each in found.slices(metric).items():
                assert figures.total(each) == pytest.approx(expected[arm], rel=1e-9), (metric, arm)
    with writing(log.engine) as connection:
        sums.rebuild(connection, "tone", 1)
    with analysis(log.engine, "tone", 1) as found:
        assert_near(state_of(found), kept)


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_near(found[key], expected[key])
    elif isinstance(expected, list) and expected and isinstance(expected[0], list):
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def in_batches(log: Log, seed: int) -> list[dict[str, Any]]:
    """Rows of a random log, written in batches in any order, so that feedback comes before and after its answers; some
    are written twice."""
    rows = answers(log, 160, seed)
    all_rows = [("exposures", row) for row in rows] + [("feedback", row) for row in feedback(log, rows, seed)]
    random.Random(seed).shuffle(all_rows)
    for start in range(0, len(all_rows), 70):
        write(log.engine, all_rows[max(start - 5, 0) : start + 70])
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_sums_follow_whatever_is_written(log: Log, seed: int) -> None:
    in_batches(log, seed)
    assert_right(log)


def test_a_corrected_outlier_leaves_no_trace(log: Log) -> None:
    """The square of 9e14 has no digit left for those of other units, nor 9e14 for other ratings of its unit."""
    chosen = random.Random(7)
    units = [(f"u{i}", ("control", "friendly")[i % 2]) for i in range(40)]
    log.write("exposures", *(log.answer(arm, unit, f"{unit}r{k}", at=1e9) for unit, arm in units for k in range(2)))
    for name in ("stars", "thumbs"):
        values = {f"{unit}r{k}": chosen.uniform(1, 5) for unit, _ in units for k in range(2)}
        log.write("feedback", *(log.said(of, value=value, metric=name, at=1e9) for of, value in values.items()))
    with analysis(log.engine, "tone", 1) as found:
        before = state_of(found)
    for at, outlier in enumerate((9e14, 1e9, 1e4, 1e-9), 1):  # in each arm, by a whole unit and by one of its ratings
        log.write("feedback", *(log.said(f"u{i}r{k}", value=outlier, metric="stars", at=1e9 + at)
                                for i, k in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 1))))  # fmt: skip
    log.write("exposures", log.answer("control", "late", "out", at=1e9))
    log.write("feedback", log.said("out", value=9e14, metric="stars", at=1e9))
    log.write("feedback", *(log.said(of, value=value, metric="stars", at=2e9) for of, value in
                            ((f"u{i}r{k}", 3.25 + i / 7) for i in range(4) for k in range(2))))  # fmt: skip
    exports.forget(log.engine, "tone", log.experiment.salt, "late")
    with analysis(log.engine, "tone", 1) as found:
        after = state_of(found)
    assert after["units"] == before["units"]
    assert after["sums"][-1] != before["sums"][-1]
    assert_right(log)


@pytest.mark.parametrize("y", [0.0, 2.0**-10, 0.3, 1023.9])
def test_most_values_have_one_scale(y: float) -> None:
    assert (unit_sums.scale_of(y), unit_sums.scale_of(-y)) == (0, 0)


def test_scales_are_alike_in_python_and_in_the_database(log: Log) -> None:
    edges = [2.0 ** (10 * power) for power in range(-5, 8)]
    values = [0.0, *edges, *(edge * (1 - 2.0**-52) for edge in edges), *(-1.5 * edge for edge in edges), 1e200]
    with log.engine.connect() as connection:
        found = [connection.execute(select(unit_sums.scale_column(literal(y, Double)))).scalar_one() for y in values]
    assert found == [unit_sums.scale_of(y) for y in values]
    assert {*found} == {*range(unit_sums.LOWEST, unit_sums.HIGHEST + 1)}


def thumbs(log: Log, version: int = 1) -> dict[str, tuple[float, ...]]:
    """The ratings of each arm: units, sum, and number."""
    with analysis(log.engine, "tone", version) as found:
        slices = found.slices(Metric("thumbs", per="response"))
        totals = {arm: figures.total(parts) for arm, parts in slices.items()}
        return {arm: (each.units, each.y, each.x) for arm, each in totals.items()}


@pytest.mark.parametrize("per", ["response", "conversation"])
def test_the_newest_value_counts_whenever_it_arrives(log: Log, per: str) -> None:
    """Who changes a mind has one opinion; a comment is none, and what arrives late may be older."""
    answer = log.answer("friendly", "ann", "r1")
    named = {"response": "r1"} if per == "response" else {"response": None, "conversation": answer["conversation"]}

    def given(at: float, **more: Any) -> None:
        log.write("feedback", {**log.said("r1", at=at, **more), **named})

    given(2.0, value=0.0)
    log.write("exposures", answer)
    assert thumbs(log) == {"friendly": (1, 0.0, 1.0)}
    given(3.0, value=1.0, id="k")
    given(1.0, value=0.0)
    given(9.0, comment="no value")
    given(9.0, value=0.0, metric="stars")
    given(9.0, value=0.0, id="k")  # the first of one key is written
    assert thumbs(log) == {"friendly": (1, 1.0, 1.0)}
    exports.forget(log.engine, "tone", log.experiment.salt, "ann")
    assert thumbs(log) == {}


def test_a_conversation_that_began_in_two_versions_is_rated_in_both(log: Log) -> None:
    first, second = log.answer("control", "ann", "r1"), log.answer("friendly", "ann", "r2", version=2)
    log.write("exposures", first)
    log.write("feedback", log.said(None, conversation=first["conversation"], value=1.0))
    log.write("exposures", second)
    assert thumbs(log, 1) == {"control": (1, 1.0, 1.0)}
    assert thumbs(log, 2) == {"friendly": (1, 1.0, 1.0)}
    log.write("feedback", log.said("r2", value=0.0))
    assert thumbs(log, 1) == {"control": (1, 1.0, 1.0)}
    assert thumbs(log, 2) == {"friendly": (1, 1.0, 2.0)}


def test_who_is_forgotten_is_in_no_sum(log: Log) -> None:
    rows = in_batches(log, 3)
    shared = rows[0]["conversation"]
    log.write("exposures", {**log.answer("control", "u99"), "conversation": shared})
    first = min((row for row in rows if row["counted"]), key=lambda row: row["at"])
    by_hash = {log.answer("control", f"u{i}")["unit"]: f"u{i}" for i in range(25)}
    for unit in (by_hash[first["unit"]], "u7", "u8c"):  # the last is a conversation
        exports.forget(log.engine, "tone", log.experiment.salt, unit)
        assert_right(log)


def test_a_log_from_before_the_sums_has_them_when_it_is_read(log: Log) -> None:
    in_batches(log, 4)
    with analysis(log.engine, "tone", 1) as found:
        expected = state_of(found)
    with writing(log.engine) as connection:
        added = (
            "units",
            "unit_sums",
            "slot_origins",
            "tallies",
            "ratings",
            "unit_ratings",
            "feedback_counts",
            "epochs",
        )
        for table in added:
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("DROP INDEX feedback_by_conversation")
        connection.exec_driver_sql("DROP INDEX exposures_outside")
        connection.exec_driver_sql("ALTER TABLE exposures DROP COLUMN epoch")
        connection.exec_driver_sql("DELETE FROM migrations WHERE number >= 2")
    log.engine = open_log(log.experiment.log)
    log.write("exposures", log.answer("control", "u1"), log.answer("control", "new"))  # before anyone has read it
    exports.forget(log.engine, "tone", log.experiment.salt, "new")
    assert_right(log)
    exports.forget(log.engine, "tone", log.experiment.salt, "u1")
    assert expected["times"][0] <= overview_of(log)["began"]
    assert_right(log)


def overview_of(log: Log) -> dict[str, Any]:
    with analysis(log.engine, "tone", 1) as found:
        return {"began": found.began, **overview(log.engine, "tone", 1)["arms"]}


def test_rows_that_someone_else_removed_are_noticed(log: Log) -> None:
    rows = in_batches(log, 5)
    with writing(log.engine) as connection:
        connection.execute(delete(EXPOSURES).where(EXPOSURES.c.unit == rows[0]["unit"]))
    assert_right(log)
    with writing(log.engine) as connection:
        connection.execute(delete(FEEDBACK).where(FEEDBACK.c.response == rows[1]["response"]))
        connection.execute(FEEDBACK.insert(), {**log.said(rows[2]["response"], value=1.0)})
        connection.execute(FEEDBACK.insert(), {**log.said(rows[3]["response"], value=1.0)})
    assert_right(log)
    left = len({row["id"] for row in rows if row["unit"] != rows[0]["unit"]})
    assert sum(overview(log.engine, "tone", 1)["arms"][arm]["answers"] for arm in ("control", "friendly")) == left


def test_servers_that_write_at_once_lose_no_answer_of_the_sums(log: Log) -> None:
    found = answers(log, 200, 6)
    rows = [("exposures", row) for row in found] + [("feedback", row) for row in feedback(log, found, 6)]
    random.Random(6).shuffle(rows)
    engines = [open_log(log.experiment.log) for _ in range(3)]

    def writer(number: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, len(rows), 40):  # all write all rows, each in an order of its own
                part = (start + 100 * number) % len(rows)
                write(engines[number], rows[part : part + 40])

        return run

    threads = [threading.Thread(target=writer(number)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.dispose()
    assert_right(log)
    with log.engine.connect() as connection:
        there = [connection.execute(select(table.c.id)).scalars().all() for table in (EXPOSURES, FEEDBACK)]
    assert sorted(itertools.chain(*there)) == sorted({row["id"] for _, row in rows})


def test_slots_are_in_order_without_gaps() -> None:
    slots = [unit_sums.slot_of(each / 4) for each in range(4 * 3000)]
    assert set(slots) == set(range(max(slots) + 1))
    assert slots == sorted(slots)
    for elapsed in (0.0, 0.99, 63.9, 64.0, 66.1, 1e3, 12345.6, 2.6e6, 1e9):
        slot = unit_sums.slot_of(elapsed)
        assert (unit_sums.slot_end(slot - 1) if slot else 0) <= elapsed < unit_sums.slot_end(slot)
    assert unit_sums.slot_of(-5.0) == 0
    assert unit_sums.slot_of(30 * 86400) < 600
