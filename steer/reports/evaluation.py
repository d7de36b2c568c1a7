"""The report of an evaluation as one page: verdicts, curves, arms, the frontier of effect and cost, example answers."""

from __future__ import annotations

import html as markup
from collections.abc import Mapping, Sequence
from typing import Any

from steer.reports import page, text_scores
from steer.reports import pictures as draw

COLOURS = {"works": "#1a7f37", "does not work": "#b42318", "too few items": "#8a6d00"}
SHOWN = 10  # prompts whose answers are shown


def pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """The pictures by name: `dose-response`, `arms`, `frontier`; empty if matplotlib is not installed."""
    drawn = {"dose-response": _dose_response(report), "arms": _arms(report), "frontier": _frontier(report)}
    return {name: picture for name, picture in drawn.items() if picture}


def html(report: Mapping[str, Any], drawn: Mapping[str, str], record: str) -> str:
    """The page; `drawn` are the pictures, `record` names the file with the record of the run."""
    subjects = report["subjects"]
    parts = [_verdict(subject) for subject in subjects]
    parts.append(page.notes(_warnings(report)))
    has_curve = any(metric["curve"] for subject in subjects for metric in subject["metrics"])
    titles = {
        "dose-response": "Dose and response, on development items",
        "arms": "Arms, on test items: change from the base with 95 % intervals",
        "frontier": "Effect against cost: up and to the left is better",
    }
    for name, title in titles.items():
        if name == "dose-response" and not has_curve:
            continue
        parts.append(f"<h2>{title}</h2>{draw.inline(drawn.get(name))}")
        if name == "arms":
            parts += [_controls(subject) for subject in subjects]
            parts.append(_texts(report))
    parts.append(text_scores.section(report))
    parts.append(_examples(report))
    items = report["suite"]["items"]
    facts = {
        "suite": f"{report['suite']['name']}: {items['test']} test items, {items['dev']} for development",
        "base": report["model"]["digest"],
        **{
            f"point of {subject['subject']}": f"{subject['operating_point']['expression']} "
            f"({subject['operating_point']['from']})"
            for subject in subjects
        },
        "to repeat": report["command"],
    }
    parts.append(f"<h2>How it was measured</h2>{page.facts(facts)}{page.notes(report['notes'])}")
    title = f"Evaluation: {', '.join(subject['subject'] for subject in subjects)}"
    return page.page(title, "".join(parts), f"report.json; the record of the run: {record}")


def arm_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of arms: a family of random draws is one row, with the range of its draws."""
    metrics = [metric["metric"] for metric in report["subjects"][0]["metrics"]]
    header = ["", *(f"{metric} vs base" for metric in metrics), "95 % interval", "KL mean", "KL p95", "KL RMS"]
    rows = []
    for name, members in families(report).items():
        first = members[0]
        effects = [[arm["effects"][metric]["mean"] for arm in members] for metric in metrics]
        if len(members) == 1:
            effect = first["effects"][metrics[0]]
            interval = page.interval(effect["low"], effect["high"], "+.3f")
        else:
            interval = f"draws {min(effects[0]):+.3f} to {max(effects[0]):+.3f}"
        figures = [f"{sum(values) / len(values):+.3f}" for values in effects]
        kl = [sum(arm["kl"][key] for arm in members) / len(members) for key in ("mean", "p95", "rms")]
        label = name if len(members) == 1 else f"{name} ({len(members)} draws)"
        rows.append([label, *figures, interval, *(f"{value:.3f}" for value in kl)])
    return header, rows


def families(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The arms by family: single arms by their names, draws together."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    several = len(report["subjects"]) > 1
    for arm in report["arms"]:
        drawn = arm["family"] in ("shuffled", "random", "random-kl", "orthogonal")
        of_subject = f" of {arm['subject']}" if several else ""
        name = f"{arm['family']}{of_subject}" if drawn else arm["arm"]
        grouped.setdefault(name, []).append(arm)
    return grouped


def text_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of what the arms wrote."""
    header = ["", "perplexity under the base", "repeated 4-grams", "distinct-2", "length / base"]
    rows = [
        [
            arm["arm"],
            page.number(arm["texts"]["perplexity"], ".2f"),
            page.number(arm["texts"]["repeated_4grams"], ".1%"),
            page.number(arm["texts"]["distinct_2"], ".1%"),
            page.number(arm["texts"]["length_ratio"], ".2f"),
        ]
        for arm in report["arms"]
        if arm["texts"]
    ]
    return header, rows


def _verdict(subject: Mapping[str, Any]) -> str:
    colour = COLOURS[subject["outcome"]]
    return (
        f"<p style='border-left:.4rem solid {colour};padding-left:.8rem;font-size:1.1em'>"
        f"{markup.escape(subject['sentence'])}</p>{_per_item(subject)}"
    )


def against_prompt(metric: Mapping[str, Any]) -> list[str]:
    """What the subject does beside the prompt baseline, in paired differences, in sentences; none without a prompt."""
    lines = []
    for key, what, greater, smaller in (
        ("beyond_prompt", "subject less prompt", "the subject moves it more", "the prompt moves it more"),
        ("added_to_prompt", "prompt + subject less prompt", "the subject adds to the prompt",
         "the subject takes away from the prompt"),
    ):  # fmt: skip
        found = metric[key]
        if found is None:
            continue
        figures = f"{found['mean']:+.3f}"
        if found["low"] is not None:
            figures += f" ({found['low']:+.3f} to {found['high']:+.3f})"
        if metric["outcome"] == "too few items":
            conclusion = "too few items to say which is greater"
        elif found["low"] > 0:
            conclusion = greater
        elif found["high"] < 0:
            conclusion = smaller
        elif found["detectable"] is None:
            conclusion = "no test item differs"
        else:
            conclusion = f"no difference is shown, and one of {found['detectable']:.3f} would be detected"
        lines.append(f"{metric['metric']}, {what}: {figures}; {conclusion}")
    return lines


def other_behaviours(subject: Mapping[str, Any]) -> list[str]:
    """The changes on the suites of --entangled with their intervals, in a sentence; none without such suites."""
    listed = []
    for each in subject["entangled"]:
        interval = page.interval(each["low"], each["high"], "+.3f")
        within = f"{interval}; " if interval != "-" else ""
        listed.append(f"{each['suite']} {each['mean']:+.3f} ({within}{each['items']} item{'s'[: each['items'] != 1]})")
    if not listed:
        return []
    return [f"other behaviours: {', '.join(listed)}; root mean square {page.number(subject['entanglement'], '.3f')}"]


def _per_item(subject: Mapping[str, Any]) -> str:
    """What single items show, in sentences."""
    lines = []
    for metric in subject["metrics"]:
        slopes = metric["slopes"]
        if slopes:
            lines.append(
                f"{metric['metric']}: {slopes['anti_steered']:.0%} of the test items go the wrong way "
                f"({slopes['anti_steered_low']:.0%} to {slopes['anti_steered_high']:.0%}); slope per unit of the "
                f"strength: median {slopes['median']:.3f}, quartiles {slopes['low_quartile']:.3f} and "
                f"{slopes['high_quartile']:.3f}"
            )
        if metric["monotonicity"] is not None:
            lines.append(
                f"{metric['metric']}: rank correlation with strength {metric['monotonicity']:.2f} of the mean, "
                f"{metric['item_monotonicity']:.2f} of the median item (development items)"
            )
        if metric["by_answer"]:
            listed = ", ".join(f"{answer!r} {mean:+.3f}" for answer, mean in metric["by_answer"].items())
            lines.append(
                f"{metric['metric']}: by the answer that shows the behaviour {listed}; each answer counts equally, so "
                "that a preference for one of them cancels"
            )
        lines += against_prompt(metric)
        for key, name in (("in_template", "in templates of development"), ("out_of_template", "in other templates")):
            if metric[key]:
                effect = metric[key]
                interval = page.interval(effect["low"], effect["high"], "+.3f")
                lines.append(f"{metric['metric']} {name}: {effect['mean']:+.3f} ({interval}), {effect['items']} items")
    lines += other_behaviours(subject)
    return page.notes(lines) if lines else ""


def _controls(subject: Mapping[str, Any]) -> str:
    """Every control of a subject, metric by metric."""
    tables = []
    for metric in subject["metrics"]:
        rows = [
            [
                each["control"] + (f" ({each['draws']} draws)" if each["draws"] > 1 else ""),
                f"{each['mean']:+.3f}",
                page.interval(each["low"], each["high"], "+.3f"),
                f"{each['p_holm']:.3g}",
                {True: "yes", False: "no", None: "too few"}[each["beaten"]],
            ]
            for each in metric["against"]
        ]
        title = f"{subject['subject']} less the control, {metric['metric']} ({metric['unit']})"
        tables.append(f"<h3>{markup.escape(title)}</h3>")
        tables.append(page.table(["control", "difference", "95 % interval", "p (Holm)", "beaten"], rows))
    return "".join(tables)


def _texts(report: Mapping[str, Any]) -> str:
    header, rows = text_rows(report)
    return f"<h3>What the arms wrote</h3>{page.table(header, rows)}" if rows else ""


def _examples(report: Mapping[str, Any]) -> str:
    listed = [
        (each["prompt"], {name: answer["text"] for name, answer in each["answers"].items()})
        for each in report["examples"][:SHOWN]
    ]
    return f"<h2>Example answers</h2>{page.side_by_side(listed)}" if listed else ""


def _warnings(report: Mapping[str, Any]) -> Sequence[str]:
    return [f"overlap: {each}" for each in report["overlap"]]


def _metrics(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(metric["metric"], metric["unit"]) for metric in report["subjects"][0]["metrics"]]


def _short(name: str) -> str:
    """A name that fits beside a picture: both ends, since a control's kind stands at the end of its name."""
    return name if len(name) < 44 else f"{name[:24]}…{name[-18:]}"


def _dose_response(report: Mapping[str, Any]) -> str | None:
    metrics = _metrics(report)
    figure = draw.figure(9, 3.6 * len(metrics))
    if figure is None:
        return None
    grid = figure.subplots(len(metrics), 2, squeeze=False, sharey="row")
    for row, (name, unit) in zip(grid, metrics, strict=True):
        for number, subject in enumerate(report["subjects"]):
            curve: list[Any] = next((m["curve"] for m in subject["metrics"] if m["metric"] == name), [])
            if not curve:  # a prompt or a folder, which no factor scales
                continue
            colour = f"C{number}"
            factors, means = [p["factor"] for p in curve], [p["mean"] for p in curve]
            row[0].plot(factors, means, "o-", color=colour, label=_short(subject["subject"]), markersize=4)
            if all(p["low"] is not None for p in curve):
                row[0].fill_between(
                    factors, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.2, linewidth=0
                )
            doses = [p["dose"] * (1 if p["factor"] >= 0 else -1) for p in curve if p["dose"] is not None]
            if len(doses) == len(curve):
                row[1].plot(doses, means, "o-", color=colour, markersize=4)
        row[0].set(xlabel="factor of the strength", ylabel=f"change of the {name} ({unit})")
        row[1].set(xlabel="relative dose: |strength| x |direction| / |residual stream|")
        for axes in row:
            axes.axhline(0, color="#888", linewidth=0.8)
            axes.axvline(0, color="#888", linewidth=0.8)
    if grid[0][0].get_legend_handles_labels()[0]:
        grid[0][0].legend(frameon=False, fontsize=9)
    return draw.svg(figure)


def _arms(report: Mapping[str, Any]) -> str | None:
    metrics, grouped = _metrics(report), families(report)
    figure = draw.figure(9, (0.9 + 0.32 * len(grouped)) * len(metrics))
    if figure is None:
        return None
    grid = figure.subplots(len(metrics), 1, squeeze=False)
    names = list(grouped)
    for (axes,), (metric, unit) in zip(grid, metrics, strict=True):
        for position, members in enumerate(grouped.values()):
            effects = [arm["effects"][metric] for arm in members]
            colour = "C0" if members[0]["family"] == "subject" else "#777"
            if len(members) == 1 and effects[0]["low"] is not None:
                axes.plot([effects[0]["low"], effects[0]["high"]], [position] * 2, color=colour, linewidth=2)
            axes.plot([e["mean"] for e in effects], [position] * len(effects), "o", color=colour, markersize=4,
                      alpha=0.9 if len(members) == 1 else 0.5)  # fmt: skip
        axes.axvline(0, color="#888", linewidth=0.8)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(f"change of the {metric} from the base ({unit})")
    return draw.svg(figure)


def _frontier(report: Mapping[str, Any]) -> str | None:
    metrics = _metrics(report)
    figure = draw.figure(9, 3.8 * len(metrics))
    if figure is None:
        return None
    grid = figure.subplots(len(metrics), 1, squeeze=False)
    for (axes,), (metric, unit) in zip(grid, metrics, strict=True):
        for number, subject in enumerate(report["subjects"]):
            curve: list[Any] = next((m["curve"] for m in subject["metrics"] if m["metric"] == metric), [])
            points = sorted((p["kl"]["p95"], p["mean"]) for p in curve if p["factor"] >= 0)
            if points:
                label = f"{_short(subject['subject'])}: curve (development)"
                axes.plot(*zip(*points, strict=True), "-", color=f"C{number}", alpha=0.5, label=label)
        listed = families(report)
        subjects = [name for name, members in listed.items() if members[0]["family"] == "subject"]
        for number, (name, members) in enumerate(listed.items()):
            is_subject = name in subjects
            place = subjects.index(name) if is_subject else number + len(subjects)
            axes.plot(
                [arm["kl"]["p95"] for arm in members], [arm["effects"][metric]["mean"] for arm in members],
                "DPX*hH8d"[place % 8] if is_subject else "ov^s<>px"[number % 8], markersize=8 if is_subject else 5,
                color=f"C{place % 10}", linestyle="none", label=_short(name), alpha=0.7,
            )  # fmt: skip
        axes.axhline(0, color="#888", linewidth=0.8)
        axes.set(xlabel="95th percentile of the KL on neutral text (nats)", ylabel=f"change of the {metric} ({unit})")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return draw.svg(figure)
