"""The page of an experiment's report: decision, arms, metrics with intervals, the course over time, guardrails."""

from __future__ import annotations

import html as escaping
import time
from collections.abc import Mapping, Sequence
from typing import Any

from steer.reports import page, pictures


def interval(found: Mapping[str, Any]) -> str:
    """A difference with its interval in one cell; what is known of it where there is no interval yet."""
    if found["estimate"] is None:
        return "no data"
    estimate = f"{found['estimate']:+.4g}"
    return estimate if found["low"] is None else f"{estimate} ({found['low']:+.4g} to {found['high']:+.4g})"


def number(value: float | None) -> str:
    """A figure in a cell; empty for none."""
    return "" if value is None else f"{value:.4g}"


def decision_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """(arm, decision, because, more units) of each arm. One that has none when the experiment is stopped gets none."""
    rows = []
    for arm, each in report["decisions"].items():
        over = report["stopped"] and each["state"] == "keep running"
        rows.append([arm, "undecided" if over else each["state"], f"{each['reason']}, when it was stopped" if over else
                     each["reason"], "" if over or not each["more_units"] else f"{each['more_units']:,}"])  # fmt: skip
    return rows


def stopped(report: Mapping[str, Any]) -> str:
    """That an experiment has been stopped, as a sentence; empty while it runs."""
    if not report["stopped"]:
        return ""
    return f"Stopped: {report['stopped']}. New conversations get the control, and no more units enter."


GUARDRAIL_COLUMNS = ("guardrail", "arm", "limit", "beyond the limit by", "state")


def guardrail_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for each guardrail and arm. The excess is in a unit of its own, which the limit may not have."""
    return [
        [each["guardrail"], each["arm"], number(each["limit"]), f"{number(each['excess'])} {each['excess_in']}",
         each["state"]]
        for each in report["guardrails"]
    ]  # fmt: skip


def metric_rows(report: Mapping[str, Any], primary: bool) -> list[list[str]]:
    """A row for each metric and arm besides the control: means, difference with interval, p-value. With adaptive
    weights, for each arm: units, mean with interval, difference."""
    control = next(arm["name"] for arm in report["arms"] if arm["control"])
    rows = []
    for metric in report["metrics"]:
        if metric["primary"] != primary:
            continue
        if report["allocation"]:
            rows += _means(report, metric, control)
            continue
        for arm, found in metric["differences"].items():
            p = found["p"] if primary else found["adjusted_p"]
            rows.append([
                metric["name"], arm, number(metric["arms"][control]["mean"]), number(metric["arms"][arm]["mean"]),
                interval(found), number(p),
            ])  # fmt: skip
    return rows


def _means(report: Mapping[str, Any], metric: Mapping[str, Any], control: str) -> list[list[str]]:
    rows = []
    for arm, found in ((each["name"], metric["arms"][each["name"]]) for each in report["arms"]):
        mean = "no data" if found["mean"] is None else number(found["mean"])
        if found["low"] is not None:
            mean += f" ({number(found['low'])} to {number(found['high'])})"
        difference = "" if arm == control else interval(metric["differences"][arm])
        rows.append([metric["name"], arm, str(found["units"]), mean, difference])
    return rows


def metric_columns(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `metric_rows`."""
    return MEANS if report["allocation"] else METRICS


LATEST = 40  # epochs that a page lists
MEANS = ("metric", "arm", "units", "mean", "difference from the control")
EVIDENCE = ("arm", "weight now", "units", "evidence against it", "needed")


def verdict(selection: Mapping[str, Any]) -> str:
    """What the selection is, in a sentence."""
    return f"{selection['reason']}." if selection["selected"] else f"{selection['state']}: {selection['reason']}."


def evidence_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for each arm: its weight, its units, and the evidence that it is not the best one."""
    selection, rows = report["allocation"], []
    for arm in (each["name"] for each in report["arms"]):
        units = sum(epoch["units"].get(arm, 0) for epoch in selection["epochs"])
        against = selection["against"].get(arm, {"evidence": None, "threshold": None})
        leads = "leads" if arm == selection["leader"] and selection["against"] else number(against["evidence"])
        weight = f"{selection['epochs'][-1]['weights'][arm]:.3g}"
        rows.append([arm, weight, str(units), leads, number(against["threshold"])])
    return rows


METRICS = ("metric", "arm", "control", "arm's mean", "difference", "p")


def html(report: Mapping[str, Any], record: str) -> str:
    """The report as one page; `record` names the file with everything in numbers."""
    level = f"{100 * report['level']:.4g} %"
    body = _selection(report) if report["allocation"] else ["<h2>Decision</h2>", page.table(
        ["arm", "decision", "because", "more units"], decision_rows(report), ("decision", "because"),
    )]  # fmt: skip
    if report["stopped"]:
        body.append(f"<p>{escaping.escape(stopped(report))}</p>")
    share = "share at first" if report["allocation"] else "share"
    body += ["<h2>Arms</h2>", page.table(
        ["arm", share, "units", "answers", "failed", "refused", "what it does"],
        [[arm["name"], f"{100 * arm['weight']:.4g} %", str(arm["units"]), str(arm.get("counted", 0)),
          str(arm.get("failed", 0)), str(arm.get("refused", 0)), arm["does"]] for arm in report["arms"]],
        ("what it does",),
    )]  # fmt: skip
    if report["metrics"]:
        body += [
            "<h2>The primary metric</h2>",
            page.table(metric_columns(report), metric_rows(report, primary=True), ("arm",)),
        ]
        if not report["allocation"]:
            body += [_course(report)]
        if secondary := metric_rows(report, primary=False):
            body += ["<h2>Other metrics (exploratory)</h2>", page.table(metric_columns(report), secondary, ("arm",))]
    else:
        body.append("<p>Results are not shown: the experiment is unhealthy.</p>")
    if report["guardrails"]:
        body += ["<h2>Guardrails</h2>", page.table(GUARDRAIL_COLUMNS, guardrail_rows(report), ("arm", "state"))]
    if report["conversations"]:
        body += ["<h2>Sample conversations</h2>", page.table(
            ["arm", "prompt", "answer"],
            [[each["arm"], each["prompt"], each["answer"]] for each in report["conversations"]],
        ).replace("<table>", "<table class='texts'>", 1)]  # fmt: skip
    body += [page.notes(notes(report, level)), page.facts(facts(report))]
    return page.page(f"Experiment {report['experiment']}", "".join(body), record)


def notes(report: Mapping[str, Any], level: str) -> list[str]:
    """What a reader needs to read the figures."""
    left = report["left_out"]
    others = ", ".join(f"{count} {reason}" for reason, count in left.items() if reason != "units_in_two_arms" and count)
    lines = [
        _of_intervals(report, level),
        f"Units seen in two arms are left out: {left['units_in_two_arms']}. "
        + (f"Answers left out: {others}." if others else "No answer is left out."),
        f"The shares of the arms are checked by a chi-square test: p = {report['sample_ratio']['p']:.3g} "
        f"(unhealthy below {report['sample_ratio']['threshold']:g}).",
    ]
    if any(not metric["primary"] for metric in report["metrics"]):
        lines.append("P-values of other metrics are adjusted together (Benjamini and Hochberg).")
    for metric in report["metrics"]:
        if metric["variance_removed"]:
            lines.append(
                f"{metric['name']}: adjusted by the unit's mean before it entered the experiment (CUPED), which "
                f"removes {metric['variance_removed']:.0%} of the variance."
            )
        if metric["source"] == "judge":
            validated = [event["reason"] for event in report["events"] if event["kind"] == "validated"]
            of_judge = [reason for reason in validated if reason.startswith(f"{metric['name']}: ")]
            lines.append(
                f"{of_judge[-1]}." if of_judge else f"{metric['name']}: scored by a judge that has not been validated "
                f"here: steer ab judges {report['experiment']} --labels FILE."
            )  # fmt: skip
            for reason, count in report["judges"].get(metric["name"], {}).items():
                lines.append(f"{metric['name']}: ratings are missing, of at least {count} answers: {reason}.")
            if all(not each["units"] for each in metric["arms"].values()):
                lines.append(f"{metric['name']}: there is no rating of the judge at all.")
        few = [arm for arm, each in metric["differences"].items() if each["interval"].startswith("empirical")]
        if few:
            lines.append(f"{metric['name']}: for few units, the interval of {', '.join(few)} is an empirical Bernstein "
                         "confidence sequence, which is not asymptotic.")  # fmt: skip
    return lines


def _of_intervals(report: Mapping[str, Any], level: str) -> str:
    few = f"Below {report['fewest']} units of an arm there are figures and no verdict."
    if not report["allocation"]:
        return (
            f"Intervals hold at the level of {level} at every interim analysis at once, so the report may be read at "
            f"any time. {few}"
        )
    return (
        "The weights follow the results, which biases what a fixed allocation would estimate: there is no verdict "
        f"about effects. The means of all arms lie in their intervals at once at the level of {level}, at every "
        "interim analysis and however units are shared; the interval of a difference is what they leave. "
        f"{few} A metric that drifts, as by the time of day, misleads a selection, since early units are of other arms "
        "than late ones."
    )


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Where the figures come from, and how to compute them again."""
    return {
        "experiment": f"{report['experiment']}, version {report['version']}",
        "digest of the experiment": report["digest"],
        "first and last answer": " to ".join(clock(report[key]) for key in ("began", "ended") if report[key]),
        "digest of the report": report["report_digest"],
        "again": f"steer ab report {report['experiment']} --version {report['version']}",
    }


def clock(seconds: float) -> str:
    """A time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _selection(report: Mapping[str, Any]) -> list[str]:
    """The block about the selection: the arm, the evidence, and how the weights have changed."""
    found = report["allocation"]
    arms = [arm["name"] for arm in report["arms"]]
    rows = [
        [str(epoch["epoch"]), clock(epoch["at"]) if epoch["at"] else "",
         *(f"{epoch['weights'][arm]:.3g}" for arm in arms), str(sum(epoch["units"].values())), epoch["reason"]]
        for epoch in found["epochs"][-LATEST:]
    ]  # fmt: skip
    return [
        f"<h2>{escaping.escape(found['label'].capitalize())}</h2><p><b>{escaping.escape(verdict(found))}</b></p>",
        page.table(EVIDENCE, evidence_rows(report), ("arm",)),
        _weights(report),
        "<h2>Epochs of weights</h2>",
        page.table(
            ["epoch", "began", *(f"weight of {arm}" for arm in arms), "units", "because"], rows, ("began", "because")
        ),
    ]


def _weights(report: Mapping[str, Any]) -> str:
    """The weights over time, as SVG; nothing while they are those of the file."""
    epochs = report["allocation"]["epochs"]
    if len(epochs) < 2 or report["began"] is None:
        return ""
    drawn = pictures.figure(7.6, 2.6)
    if drawn is None:
        return pictures.MISSING
    axes = drawn.subplots()
    times = [report["began"], *(epoch["at"] for epoch in epochs[1:]), max(report["ended"], epochs[-1]["at"])]
    hours = [max(at - report["began"], 0.0) / 3600 for at in times]
    for arm in (each["name"] for each in report["arms"]):
        shares = [100 * epoch["weights"][arm] for epoch in epochs]
        axes.step(hours, [*shares, shares[-1]], where="post", label=arm)
    axes.set_xlabel("hours since the first answer")
    axes.set_ylabel("share of new units, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    return pictures.inline(pictures.svg(drawn))


def _course(report: Mapping[str, Any]) -> str:
    """The difference on the primary metric as units arrived, with its band, as SVG; a note where there is no course."""
    course: Mapping[str, Sequence[Mapping[str, Any]]] = {
        arm: points for arm, points in report["over_time"].items() if points
    }
    if not course:
        return "<p class='note'>There are too few units for a course over time.</p>"
    drawn = pictures.figure(7.6, 3.0)
    if drawn is None:
        return pictures.MISSING
    axes = drawn.subplots()
    longest = max(each["at"] for points in course.values() for each in points) - report["began"]
    seconds, unit = (3600, "hours") if longest > 2 * 3600 else (60, "minutes")
    for arm, points in course.items():
        times = [(each["at"] - report["began"]) / seconds for each in points]
        low, high = [each["low"] for each in points], [each["high"] for each in points]
        # A line or a band of one point can't be seen.
        marker = "." if len(points) < 9 else ""
        (line,) = axes.plot(times, [each["estimate"] for each in points], label=arm, marker=marker)
        axes.fill_between(times, low, high, alpha=0.2)
        if len(points) == 1:
            axes.vlines(times, low, high, colors=line.get_color(), alpha=0.4)
    axes.axhline(0, color="#666", linewidth=0.8)
    axes.set_xlabel(f"{unit} since the first answer")
    metric = next(each["name"] for each in report["metrics"] if each["primary"])
    axes.set_ylabel("difference from the control")
    axes.set_title(metric, fontsize="medium")
    axes.legend(frameon=False)
    return f"<h2>Effect over time</h2>{pictures.inline(pictures.svg(drawn))}"
