"""`steer ab report` on logs with known rows, in both databases."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import trials
from trials import Ab, Log

from steer.experiments.planning import alpha_of
from steer.experiments.reporting.comparing import compare, compare_all
from steer.experiments.reporting.report import report
from steer.experiments.reporting.texts import conversations
from steer.experiments.specification import Metric
from steer.experiments.statistics import moments
from steer.experiments.statistics.sequences import difference
from steer.experiments.storage import figures, ratings, sums
from steer.experiments.storage.database import write, writing
from steer.reports import experiment as pages

Rows = list[tuple[str, dict[str, Any]]]


def rows(log: Log, arm: str, count: int, good: int, **more: Any) -> Rows:
    """Units of one answer each, of which `good` got a thumb up, one a minute."""
    made: Rows = []
    for i in range(count):
        name = f"{arm}{i}"
        made.append(("exposures", log.answer(arm, name, name, at=1e9 + 60 * i, **more)))
        made.append(("feedback", log.said(name, value=float(i % count < good))))
    return made


def mixed(count: int, good: int) -> list[float]:
    return [1.0] * good + [0.0] * (count - good)


def test_the_report_has_the_difference_that_the_statistics_give(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 300, 120), *rows(log, "friendly", 310, 200)])
    found = report(log.engine, log.experiment, log.version)
    expected = difference(
        moments.mean(moments.sums_of(mixed(300, 120))), moments.mean(moments.sums_of(mixed(310, 200)))
    )
    (metric,) = found["metrics"]
    shown = metric["differences"]["friendly"]
    assert (shown["estimate"], shown["low"], shown["high"]) == pytest.approx(expected[:3])
    assert shown["p"] == pytest.approx(expected.p)
    assert found["decisions"]["friendly"]["state"] == "ship"
    assert (found["arms"][0]["units"], found["sample_ratio"]["healthy"]) == (300, True)


def test_a_report_of_a_stopped_experiment_asks_for_no_more_units(log: Log, ab: Ab) -> None:
    write(log.engine, [*rows(log, "control", 150, 70), *rows(log, "friendly", 150, 75)])
    _, before, _ = ab("report", "tone")
    ((_, decision, _, units),) = pages.decision_rows(before)
    assert (decision, units != "", pages.stopped(before)) == ("keep running", True, "")
    ab("stop", "tone", "--reason", "users complain")
    status, after, _ = ab("report", "tone")
    ((_, decision, reason, units),) = pages.decision_rows(after)
    assert (status, decision, units, "when it was stopped" in reason) == (1, "undecided", "", True)
    assert "Stopped: users complain." in pages.stopped(after)
    assert "Stopped: users complain." in pages.html(after, "x")


def test_the_course_over_time_ends_at_the_difference_and_its_slices_have_each_unit_once(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 300, 120), *rows(log, "friendly", 300, 200)])
    found = report(log.engine, log.experiment, log.version)
    last, shown = found["over_time"]["friendly"][-1], found["metrics"][0]["differences"]["friendly"]
    assert (last["units"], last["estimate"], last["low"]) == (600, pytest.approx(shown["estimate"]), shown["low"])
    counts = [point["units"] for point in found["over_time"]["friendly"]]
    assert counts == sorted(counts)
    assert counts[0] < 300


def test_wrong_shares_hide_all_results(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 300, 120), *rows(log, "friendly", 150, 120)])
    found = report(log.engine, log.experiment, log.version)
    assert (found["metrics"], found["over_time"], found["sample_ratio"]["healthy"]) == ([], {}, False)
    assert found["decisions"]["friendly"]["state"] == "unhealthy"


def test_what_does_not_count_is_left_out_and_counted(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 120, 60), *rows(log, "friendly", 120, 60)])
    before = report(log.engine, log.experiment, log.version)
    log.write(
        "exposures",
        log.answer("control", "moved", "m1"), log.answer("friendly", "moved", "m2"),
        log.answer("friendly", "tester", "t1", reason="forced", counted=False),
        log.answer("friendly", "early", "e1", counted=False),
        log.answer("control", "far", "f1", reason="outside", counted=False),
    )  # fmt: skip
    log.write("feedback", *(log.said(name, value=1.0) for name in ("m1", "m2", "t1", "e1", "f1")))
    after = report(log.engine, log.experiment, log.version)
    assert after["metrics"] == before["metrics"]
    assert after["left_out"] == {"units_in_two_arms": 1, "forced": 1, "outside": 1, "ramp": 1}


def test_few_units_give_an_interval_of_a_bounded_metric_and_no_verdict(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 60, 0), *rows(log, "friendly", 60, 60)])
    found = report(log.engine, log.experiment, log.version)
    shown = found["metrics"][0]["differences"]["friendly"]
    assert shown["interval"].startswith("empirical Bernstein")
    assert 0 < shown["low"] < 1 == shown["estimate"]
    assert shown["p"] < 0.05
    assert found["decisions"]["friendly"]["state"] == "keep running"


def test_a_metric_per_response_is_the_ratio_of_sums(log: Log) -> None:
    generator = random.Random(1)
    made: Rows = []
    values: dict[str, list[tuple[float, float]]] = {"control": [], "friendly": []}
    for arm, pairs in values.items():
        for i in range(150):
            lengths = [generator.randrange(5, 50) for _ in range(generator.randrange(1, 5))]
            pairs.append((float(sum(lengths)), float(len(lengths))))
            made += [("exposures", log.answer(arm, f"{arm}{i}", response_tokens=length)) for length in lengths]
    write(log.engine, made)
    metric = Metric("response_tokens", "number", per="response")
    with figures.analysis(log.engine, "tone", log.version) as analysis:
        found = compare(analysis, metric, "control", ["friendly"], 0.05)
    for arm, pairs in values.items():
        y, x = zip(*pairs, strict=True)
        expected = moments.ratio(moments.sums_of(y, x))
        assert found.estimates[arm].mean == pytest.approx(sum(y) / sum(x))
        assert found.estimates[arm].variance == pytest.approx(expected.variance)


def test_answers_before_a_unit_entered_take_variance_away_and_move_nothing(log: Log) -> None:
    generator = random.Random(2)
    made: Rows = []
    for arm, effect in (("control", 0.0), ("friendly", 2.0)):
        for i in range(200):
            usual = generator.gauss(100, 30)
            made.append(("exposures", log.answer("control", f"{arm}{i}", at=1.0, reason="outside", counted=False,
                                                 latency=usual + generator.gauss(0, 3))))  # fmt: skip
            made.append(("exposures", log.answer(arm, f"{arm}{i}", latency=usual + effect + generator.gauss(0, 3))))
    write(log.engine, made)
    metrics = [Metric("latency", "number"), Metric("repetition", "number")]
    with figures.analysis(log.engine, "tone", log.version) as analysis:
        found, other = compare_all(analysis, metrics, "control", ["friendly"], 0.05)
    assert (found.adjusted > 0.9, other.adjusted) == (True, 0.0)
    shown = found.differences["friendly"]
    assert 0 < shown.low < 2 < shown.high < 5  # without the covariate the interval is 15 wide


def test_only_answers_from_before_a_unit_entered_are_its_covariate(log: Log) -> None:
    outside = {"reason": "outside", "counted": False}
    log.write(
        "exposures",
        log.answer("control", "ann", at=1.0, latency=10.0, ttft=7.0, **outside),
        log.answer("friendly", "ann", at=2.0, latency=20.0, ttft=3.0, repetition=0.5),  # that has no mean before
        log.answer("control", "ann", at=3.0, latency=90.0, **outside),  # a conversation that had begun outside
        log.answer("friendly", "bob", at=2.0, latency=20.0),
        log.answer("control", "bob", at=3.0, latency=90.0, **outside),
    )
    metrics = [Metric("latency", "number"), Metric("repetition", "number"), Metric("ttft", "number")]
    with figures.analysis(log.engine, "tone", log.version) as analysis:
        found = analysis.before(metrics)
    assert {name: (each["friendly"].units, each["friendly"].x, each["friendly"].y)
            for name, each in found.items() if each} == {"latency": (1, 10.0, 20.0), "ttft": (1, 7.0, 3.0)}  # fmt: skip


def test_feedback_about_two_answers_of_one_id_counts_once(log: Log) -> None:
    log.write("exposures", *(log.answer("control", "ann", "chatcmpl-chosen-by-the-client") for _ in range(3)))
    log.write("exposures", log.answer("control", "ann", "another"))
    log.write("feedback", log.said("chatcmpl-chosen-by-the-client", value=1.0), log.said("another", value=0.0))
    with figures.analysis(log.engine, "tone", log.version) as analysis:
        (mean,) = analysis.first_values(Metric("thumbs"), "control", 10)
        ratio = figures.total(analysis.slices(Metric("thumbs", per="response"))["control"])
    assert mean == 0.5
    assert (ratio.y, ratio.x) == (1.0, 2.0)


def test_secondary_metrics_are_adjusted_together_and_several_arms_share_the_level(tmp_path: Path) -> None:
    arms = {"control": {}, "a": {"steer": "1.2*warm"}, "b": {"steer": "0.5*warm"}}
    log = Log(
        tmp_path,
        f"sqlite:///{tmp_path}/log.db",
        arms=arms,
        secondary=[{"name": "response_tokens"}, {"name": "latency"}],
    )
    made: Rows = []
    for arm, tokens in (("control", 10), ("a", 30), ("b", 10)):
        for i in range(120):
            made.append(("exposures", log.answer(arm, f"{arm}{i}", response_tokens=tokens + i % 7, latency=i % 5 / 10)))
    write(log.engine, made)
    found = report(log.engine, log.experiment, log.version)
    assert (found["level"], alpha_of(log.experiment)) == (0.975, 0.025)
    by_name = {metric["name"]: metric for metric in found["metrics"]}
    longer = by_name["response_tokens"]["differences"]["a"]
    assert longer["adjusted_p"] == pytest.approx(4 * longer["p"])
    assert by_name["latency"]["differences"]["a"]["adjusted_p"] == pytest.approx(1.0)
    assert by_name["thumbs"]["differences"]["a"]["adjusted_p"] is None


def test_a_guardrail_that_is_breached_rolls_the_arm_back(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 200, 50), *rows(log, "friendly", 200, 190, repetition=0.9)])
    write(log.engine, [("exposures", log.answer("control", f"c{i}", repetition=0.01)) for i in range(200)])
    write(log.engine, [("exposures", log.answer("friendly", f"f{i}", repetition=0.95)) for i in range(200)])
    found = report(log.engine, log.experiment, log.version)
    states = {each["guardrail"]: each["state"] for each in found["guardrails"]}
    assert states["repetition"] == "outside"
    assert found["decisions"]["friendly"]["state"] == "roll back"


def test_the_command_writes_a_page_that_escapes_what_users_wrote(ab: Ab, tmp_path: Path) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/log.db", store_texts=True)
    prompt = json.dumps([{"role": "user", "content": "<script>alert(1)</script>"}])
    write(
        log.engine,
        [*rows(log, "control", 120, 30, prompt=prompt, answer="<b>no</b>"), *rows(log, "friendly", 120, 100)],
    )
    status, data, _ = ab("report", "tone", "--html")
    assert status == 0
    assert json.loads((tmp_path / "tone-report.json").read_text())["report_digest"] == data["report_digest"]
    page = (tmp_path / "tone-report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<b>no" not in page
    assert "Effect over time" in page


def test_exit_code_1_while_nothing_is_decided(ab: Ab, tmp_path: Path) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/log.db")
    status, data, _ = ab("report", "tone")
    assert (status, data["decisions"]["friendly"]["state"]) == (1, "keep running")
    write(log.engine, [*rows(log, "control", 150, 75), *rows(log, "friendly", 150, 76)])
    status, data, _ = ab("report", "tone")
    assert (status, data["decisions"]["friendly"]["state"]) == (1, "keep running")
    assert data["decisions"]["friendly"]["more_units"] > 0


def test_an_edited_file_is_no_report_of_the_newest_version(ab: Ab, tmp_path: Path) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/log.db")
    trials.written(tmp_path, log=log.experiment.log, coverage=0.3)
    status, data, _ = ab("report", "tone")
    assert (status, "as it is now is not served" in data["error"]) == (2, True)


def test_one_late_answer_does_not_squeeze_the_course_over_time(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 300, 120), *rows(log, "friendly", 300, 200)])
    log.write("exposures", log.answer("friendly", "friendly0", "late", at=2e9))
    log.write("exposures", log.answer("control", "m", at=3e9), log.answer("friendly", "m", at=3e9))
    found = report(log.engine, log.experiment, log.version)
    assert found["ended"] == 3e9
    assert len({point["units"] for point in found["over_time"]["friendly"]}) > 20


def test_feedback_and_answers_find_each_other_by_an_index_and_a_report_reads_their_sums(tmp_path: Path) -> None:
    log = Log(tmp_path, f"sqlite:///{tmp_path}/log.db")
    read: list[str] = []
    sqlalchemy.event.listen(
        log.engine, "before_cursor_execute",
        lambda connection, cursor, statement, values, *_: read.append(_plan(connection, statement, values)),
    )  # fmt: skip
    log.write("exposures", log.answer("control", "ann", "r1"))
    log.write("feedback", log.said("r1", value=1.0), log.said(None, conversation="c", value=1.0))
    log.write("exposures", log.answer("control", "bob", reason="outside", counted=False))
    with writing(log.engine) as connection:
        ratings.rebuild(connection, "tone", log.version)
    plans = [each for each in read if "feedback" in each or "exposures" in each]
    for name, column in itertools.product(("exposures", "feedback"), ("response", "conversation")):
        assert any(f"SEARCH {name} USING INDEX {name}_by_{column} ({column}=?)" in each for each in plans), name
    assert not [each for each in plans if "exposures_by_version" in each or "feedback_by_metric" in each]
    read.clear()
    report(log.engine, log.experiment, log.version)
    assert not [each for each in read if "feedback_by_response" in each or "exposures_by_response" in each]
    with figures.analysis(log.engine, "tone", log.version) as analysis:
        analysis.before([Metric("latency", "number")])
    assert "SEARCH exposures USING COVERING INDEX exposures_outside (experiment=?)" in read[-1]


def _plan(connection: Any, statement: str, values: Any) -> str:
    """How SQLite reads what a query asks for."""
    if not statement.startswith(("SELECT", "WITH", "INSERT INTO ratings")):
        return ""
    raw = connection.connection.driver_connection
    return "\n".join(row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", values))


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_a_report_while_the_database_works(
    ab: Ab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: int
) -> None:
    Log(tmp_path, f"sqlite:///{tmp_path}/log.db")
    counting = (
        "WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i < 200000000) SELECT count(*) FROM k"
    )

    def complete(connection: Any, *_: Any) -> bool:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), number)).start()
        return bool(connection.exec_driver_sql(counting).scalar())

    monkeypatch.setattr(sums, "complete", complete)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        status, data, _ = ab("report", "tone")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, "hint" in data) == (expected, True)


def test_sample_conversations_are_answers_and_no_refused_requests(log: Log) -> None:
    prompt, texts = json.dumps([{"role": "user", "content": "Hello"}]), ["", "first", "second", "third", "fourth"]
    for i, answer in enumerate(texts):
        status = 200 if answer else 400
        log.write("exposures", log.answer("control", f"u{i}", at=i, status=status, prompt=prompt, answer=answer))
    found = conversations(log.engine, "tone", log.version)
    assert [each["answer"] for each in found] == texts[1:4]
    assert found[0]["prompt"] == "Hello"


def test_a_guardrail_with_two_sides_is_shown_once_with_the_worse_of_them(log: Log) -> None:
    write(log.engine, [*rows(log, "control", 100, 50), *rows(log, "friendly", 100, 50, response_tokens=3)])
    found = report(log.engine, log.experiment, log.version)
    (length,) = (each for each in found["guardrails"] if each["guardrail"] == "length_ratio")
    assert length["excess"] == pytest.approx(4.0)  # 10 tokens against twice 3; the other side is at 3 - 2 * 10
