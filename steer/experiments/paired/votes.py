"""Blind votes between the answers of two arms to one prompt: which pairs, on which side, and what was decided."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.seeds import child_seed
from steer.evaluation.judging.endpoint import Endpoint
from steer.evaluation.judging.pairs import Pair, prefer
from steer.experiments.paired.answers import Answer, Row
from vectors.documents import json_text
from vectors.documents.schema import one_of, optional, problems_of, record, text, whole
from vectors.errors import ArtifactError
from vectors.events import OnEvent
from vectors.storage.files import append_line, canonical_json

FILE = "votes.jsonl"
PERSON, JUDGE, SAME = "person", "judge", "same text"


class Ballot(NamedTuple):
    """What is asked: two answers to one prompt. `arms` are those of the left and the right side, which nobody sees."""

    prompt: int
    arms: tuple[str, str]
    texts: tuple[str, str]


class Vote(NamedTuple):
    """What was decided between two arms (in the order of the experiment) on one prompt.

    `winner` is 1 for the first arm, -1 for the second, 0 for a tie; None where nobody could decide, and then `reason`
    says why. `left` is the arm that stood on the left.
    """

    prompt: int
    first: str
    second: str
    winner: int | None
    by: str
    left: str = ""
    reason: str = ""


# What a person says to a ballot: 1 for the left side, -1 for the right, 0 for a tie, None to end.
Say = Callable[[str, Ballot, int, int], int | None]


def ballots(
    arms: Sequence[str], rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], seed: int
) -> list[Ballot]:
    """Every pair of arms on the first answer to every prompt, in a random order, each on a random side."""
    made = []
    for first, second in itertools.combinations(arms, 2):
        for index, row in enumerate(rows):
            if row.sample:
                continue
            left, right = (
                (first, second) if child_seed(seed, "side", row.prompt, first, second) % 2 else (second, first)
            )
            made.append(Ballot(row.prompt, (left, right), (answers[left][index].text, answers[right][index].text)))
    return sorted(made, key=lambda each: child_seed(seed, "order", each.prompt, *sorted(each.arms)))


def same(arms: Sequence[str], listed: Sequence[Ballot]) -> list[Vote]:
    """The ties between equal texts, about which nobody is asked."""
    return [_vote(arms, each, 0, SAME) for each in listed if each.texts[0] == each.texts[1]]


def of_judge(
    judge: Endpoint, concept: str, prompts: Sequence[str], arms: Sequence[str], listed: Sequence[Ballot],
    on_event: OnEvent,
) -> list[Vote]:  # fmt: skip
    """The votes of a judge, which is asked about every ballot in both orders, and abstains where the order decides."""
    asked = [each for each in listed if each.texts[0] != each.texts[1]]
    found = prefer(judge, concept, [Pair(prompts[each.prompt], *each.texts) for each in asked], on_event)
    return [
        _vote(arms, each, preference.value, JUDGE, preference.reason)
        for each, preference in zip(asked, found, strict=True)
    ]


def of_person(
    say: Say, prompts: Sequence[str], arms: Sequence[str], listed: Sequence[Ballot], folder: Path
) -> Iterator[Vote]:
    """Ask a person about the ballots that the folder holds no vote for; each vote is written at once."""
    done = {(vote.prompt, vote.first, vote.second) for vote in stored(folder)}
    asked = [each for each in listed if each.texts[0] != each.texts[1]]
    open_ = [each for each in asked if (each.prompt, *_ordered(arms, each)) not in done]
    for number, ballot in enumerate(open_, 1):
        choice = say(prompts[ballot.prompt], ballot, number, len(open_))
        if choice is None:
            return
        vote = _vote(arms, ballot, choice, PERSON)
        append_line(folder / FILE, canonical_json(vote._asdict()).encode())
        yield vote


_VOTE = record(
    {"prompt": whole(0, 10**9), "first": text(), "second": text(), "winner": optional(whole(-1, 1)),
     "by": one_of(PERSON), "left": text(), "reason": text()},
)  # fmt: skip


def stored(folder: Path) -> list[Vote]:
    """The votes of a person in a folder, in order; the last one about a ballot counts. Raises ArtifactError."""
    path = folder / FILE
    if not path.is_file():
        return []
    hint = f"remove the line, or all votes: rm {path}"
    votes: dict[tuple[int, str, str], Vote] = {}
    # A line that a kill has cut off has no end, and does not count.
    for number, line in enumerate(json_text.read_bounded(path, json_text.LARGEST).split(b"\n")[:-1], 1):
        try:
            value: Any = json_text.parse(line)
        except ValueError as error:
            raise ArtifactError(f"{path}, line {number} is damaged: {error}", hint) from error
        problems = problems_of(value, _VOTE)
        if problems:
            raise ArtifactError([f"{path}, line {number}: {problem}" for problem in problems], hint)
        vote = Vote(**value)
        votes[vote.prompt, vote.first, vote.second] = vote
    return list(votes.values())


def _ordered(arms: Sequence[str], ballot: Ballot) -> tuple[str, str]:
    first, second = sorted(ballot.arms, key=list(arms).index)
    return first, second


def _vote(arms: Sequence[str], ballot: Ballot, choice: int | None, by: str, reason: str = "") -> Vote:
    first, second = _ordered(arms, ballot)
    winner = choice if choice is None or ballot.arms[0] == first else -choice
    return Vote(ballot.prompt, first, second, winner, by, ballot.arms[0], reason)
