"""The report of a paired experiment as JSON values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from probes.statistics.verdict import FEWEST
from steer.experiments.paired.answers import Answer, Row
from steer.experiments.paired.figures import LENGTHS, MOST_CUT, Compared, Cut, Judged, verdict_of
from steer.experiments.paired.inputs import Inputs
from steer.experiments.paired.ranking import Pairing, pairings, strengths
from steer.experiments.paired.request import Request
from steer.experiments.paired.votes import SAME, Vote

SHOWN = 8  # prompts whose answers are shown


def report_of(
    inputs: Inputs, request: Request, engine: str, rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]],
    measures: Mapping[str, tuple[str, Mapping[str, Compared]]], votes: Sequence[Vote], confidence: float,
) -> dict[str, Any]:  # fmt: skip
    """Everything that was found; `measures` are (unit, comparison by arm), intervals are at `confidence`."""
    experiment, names = inputs.experiment, [arm.name for arm in inputs.arms]
    main = experiment.metric if experiment.metric.name in measures else None
    cut = {name: sum(len(a.ids) >= request.max_tokens for a in answers[name]) / len(rows) for name in names}
    verdicts = [] if main is None else [
        verdict_of(arm, main, each.difference, Cut(cut[arm], cut[names[0]], request.max_tokens))
        for arm, each in measures[main.name][1].items() if arm != names[0]
    ]  # fmt: skip
    voted = _votes(names, votes, request.seed, confidence)
    count = len(inputs.prompts)
    return {
        "experiment": experiment.name,
        "digest": experiment.digest,
        "model": str(inputs.opened.source),
        "engine": engine,
        "prompts": count,
        "samples": request.samples,
        "settings": {key: getattr(request, key) for key in ("max_tokens", "temperature", "seed")},
        "confidence": confidence,
        "arms": [
            {"name": arm.name, "does": arm.text(), "digest": arm.digest, "control": arm.plain, "cut": cut[arm.name]}
            for arm in sorted(experiment.arms, key=lambda each: not each.plain)
        ],
        "measures": [
            {
                "name": name,
                "unit": unit,
                "main": main is not None and name == main.name,
                "arms": {
                    arm: {
                        "mean": each.mean,
                        "difference": each.difference and each.difference._asdict(),
                        "missing": each.missing,
                    }
                    for arm, each in by_arm.items()
                },
            }
            for name, (unit, by_arm) in measures.items()
        ],
        "verdicts": [each._asdict() for each in verdicts],
        "votes": voted,
        "examples": [
            {"prompt": inputs.prompts[row.prompt], "answers": {name: answers[name][i].text for name in names}}
            for i, row in enumerate(rows)
            if row.sample == 0
        ][:SHOWN],
        "notes": _notes(inputs, count, main is None, verdicts, voted, confidence, cut),
    }


def _votes(names: Sequence[str], votes: Sequence[Vote], seed: int, confidence: float) -> dict[str, Any] | None:
    """Win rates, with more than two arms strengths too, and who voted; None without votes.

    Rates hold together at 95 % over all pairs, each of which has a verdict; strengths, at `confidence`, over the arms
    besides the control.
    """
    if not votes:
        return None
    rated = strengths(names, votes, seed=seed, alpha=1 - confidence) if len(names) > 2 else []
    alpha = 0.05 / max(1, math.comb(len(names), 2))
    listed = pairings(names, votes, alpha)
    return {
        "by": dict(Counter(vote.by for vote in votes)),
        "pairs": [{**each._asdict(), "decided": each.decided, "verdict": _preferred(each)} for each in listed],
        "confidence": {"pairs": 1 - alpha, "strengths": confidence},
        "strengths": [each._asdict() for each in rated],
        "missing": dict(Counter(vote.reason for vote in votes if vote.winner is None and vote.reason != "order")),
    }


def _preferred(pair: Pairing) -> str:
    """Which arm of a pair is preferred, as far as its interval says so."""
    if pair.decided < FEWEST or pair.low is None or pair.high is None:
        return "too few votes"
    return pair.second if pair.low > 0.5 else pair.first if pair.high < 0.5 else "undecided"


def _notes(
    inputs: Inputs, count: int, no_metric: bool, verdicts: Sequence[Judged], voted: Mapping[str, Any] | None,
    confidence: float, cut: Mapping[str, float],
) -> list[str]:  # fmt: skip
    """How the figures are meant, and what is missing, as sentences."""
    metric = inputs.experiment.metric
    lines = [
        f"All arms answered the same {count} prompts with the same random numbers; differences are taken prompt by "
        f"prompt, with {confidence:.1%} intervals (studentised bootstrap over prompts, no narrower than "
        "Student's t), so that those of all arms together hold at 95 %. A p-value is of the same test: it is below "
        f"{1 - confidence:.2g} exactly where the interval leaves out zero.",
    ]
    if inputs.repeated:
        lines.append(f"{inputs.repeated} lines of the file repeat a prompt, and are left out.")
    if count < FEWEST:
        lines.append(f"{count} prompts give figures and no verdict: it takes {FEWEST}.")
    lines += [
        f"{share:.0%} of the answers of {name} are as long as --max-tokens allows, so {' and '.join(LENGTHS)} are "
        "those of cut answers: raise --max-tokens."
        for name, share in cut.items()
        if share > MOST_CUT
    ]
    if no_metric:
        lines.append(f"The experiment's metric {metric.name} comes from users, so answers alone give no verdict on it.")
    elif verdicts:
        lines.append(f"The verdict is on {metric.name} alone; the other measures are exploratory.")
    if voted is not None:
        lines.append(
            "Votes were blind: each side was chosen at random, or both orders were asked. Ties count half; "
            f"{voted['by'].get(SAME, 0)} pairs of equal texts are ties. Intervals of rates are Wilson's, at "
            f"{voted['confidence']['pairs']:.1%}, so that those of all pairs together hold at 95 %."
        )
        lines += [
            f"{count} votes are missing: {reason or 'the judge gave no answer'}."
            for reason, count in voted["missing"].items()
        ]
        if voted["strengths"]:
            lines.append(
                "Strengths are log-odds against the control (Bradley and Terry), with one tie of each pair added, and "
                "intervals from resampled prompts."
            )
    return lines
