"""Scorers on the texts of several arms: planted rates, pairs, a judge that is down or partial, and validity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import asked, judge

from steer.evaluation.judging.agreement import Labelled, Labels
from steer.evaluation.scorers import GeneratedText, Resources, configured, parse
from steer.evaluation.scoring import score_arms

PROMPTS = [f"Question {i}?" for i in range(20)]


def arms(**responses: list[str]) -> dict[str, list[GeneratedText]]:
    return {
        name: [GeneratedText(p, r) for p, r in zip(PROMPTS, texts, strict=True)] for name, texts in responses.items()
    }


TEXTS = arms(base=["cold"] * 15 + ["warm"] * 5, subject=["warm"] * 15 + ["cold"] * 5)


def test_rates_and_the_paired_difference_from_the_base_are_those_that_were_planted() -> None:
    (report,) = score_arms(TEXTS, [parse("regex:warm")], Resources())
    assert report.arms["base"].rate.mean == 0.25
    assert report.arms["subject"].rate.mean == 0.75
    gain = report.arms["subject"].difference
    assert gain is not None
    assert (gain.mean, gain.items) == (0.5, 20)
    assert gain.low < 0.5 < gain.high
    assert report.arms["base"].difference is None
    assert report.validity == "regex not validated: no hand labels (--labels FILE)"
    json.dumps(report.value(), allow_nan=False)


def test_labels_give_the_agreement_of_every_scorer() -> None:
    labels = Labels([Labelled("p", "warm", 1), Labelled("p", "cold", 0), Labelled("p", "warmish", 0)] * 12, False, "")
    (report,) = score_arms(TEXTS, [parse("regex:warm")], Resources(), labels=labels)
    assert report.agreement is not None
    assert report.agreement.matrix == [[12, 12], [0, 12]]
    assert "Cohen's kappa 0.40 [" in report.validity
    assert report.validity.endswith("on 36 hand labels")


def fair(body: dict[str, Any]) -> str:
    """A judge that finds warmth where it is, and has a fixed opinion of everything else."""
    text = asked(body)
    if text.startswith("Two"):
        first, second = (text.split(f"[response {n}]\n")[1].split("\n")[0] for n in (1, 2))
        return "Better: [[tie]]" if first == second else f"Better: [[{1 if first == 'warm' else 2}]]"
    if text.startswith("You rate how clearly"):
        return "Rating: [[2]]" if "[response]\nwarm" in text else "Rating: [[0]]"
    return "Rating: [[1]]"


def settings(url: str, tmp_path: Path) -> Any:
    (tmp_path / "judge.yaml").write_text(f"url: {url}\nmodel: m\nattempts: 1\n")
    return configured({"kind": "judge", "judge": str(tmp_path / "judge.yaml"), "concept": "warmth"}, Path())


def test_a_judges_points_and_preferences_are_reported_for_every_arm(tmp_path: Path) -> None:
    with judge(fair) as server:
        (report,) = score_arms(TEXTS, [settings(server.url, tmp_path)], Resources())
        sent = len(server.requests)
    subject = report.arms["subject"]
    assert subject.rate.mean == pytest.approx(0.75 * 3 / (1 / 2 + 1 + 1))
    assert subject.preferred is not None
    assert (subject.preferred.wins, subject.preferred.losses, subject.preferred.ties) == (15, 5, 0)
    assert subject.preferred.rate == 0.75
    assert report.validity == "judge not validated: no hand labels (--labels FILE)"
    assert sent == 2 + 2 + 2 * 20 + 2 * 20  # equal questions are asked once: concept, fluency, instruction, pairs


def test_a_judge_that_is_down_leaves_the_other_scorers_as_they_are(tmp_path: Path) -> None:
    with judge(fair) as server:
        down = settings(server.url, tmp_path)
    words, judged = score_arms(TEXTS, [parse("regex:warm"), down], Resources())
    assert words.arms["subject"].rate.mean == 0.75
    subject = judged.arms["subject"]
    assert (subject.rate.mean, subject.rate.interval, subject.difference) == (None, None, None)
    assert sum(subject.rate.missing.values()) == 20
    assert subject.preferred is not None
    assert (subject.preferred.rate, sum(subject.preferred.missing.values())) == (None, 20)


def test_a_difference_is_taken_over_the_prompts_that_have_a_score_in_both_arms(tmp_path: Path) -> None:
    def partial(body: dict[str, Any]) -> str:
        return "no idea" if "Question 3?" in asked(body) else fair(body)

    with judge(partial) as server:
        (report,) = score_arms(TEXTS, [settings(server.url, tmp_path)], Resources())
    gain = report.arms["subject"].difference
    assert gain is not None
    assert gain.items == 19
    assert report.arms["subject"].rate.missing == {"the judge gave no rating": 1}


def test_a_scorer_is_not_told_which_arm_wrote_a_text(tmp_path: Path) -> None:
    with judge(fair) as server:
        score_arms(TEXTS, [settings(server.url, tmp_path)], Resources())
        assert not any("subject" in asked(body) or "base" in asked(body) for body in server.requests)
