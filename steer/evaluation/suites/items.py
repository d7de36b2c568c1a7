"""The items of a suite: pairs and multiple-choice questions, which are scored, and prompts, which are answered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from probes.data.examples import Example
from probes.statistics.strata import answer_strata

Side = Literal["dev", "test"]


class Pair(NamedTuple):
    """Two examples: one shows the behaviour, the other its opposite.

    The figure of a pair is the log-likelihood per completion token of the positive less that of the negative, in nats.
    `group` is the template or concept that several items share, "" where there is none; `id` is unique in a suite.
    """

    positive: Example
    negative: Example
    side: Side = "test"
    group: str = ""
    id: str = ""


class Choice(NamedTuple):
    """A multiple-choice question; `positive` is the index of the option that shows the behaviour.

    With `letters` the options are listed as (A), (B), …, and a letter is the answer; without them an option's text is.
    The figure of a choice is the log-odds of the positive answer against the others, in nats, averaged over the options
    as they stand and in reverse order, so that a preference for a letter or a position cancels.
    """

    question: str
    options: tuple[str, ...]
    positive: int
    letters: bool = True
    side: Side = "test"
    group: str = ""
    id: str = ""
    origin: str = ""  # FILE:LINE or the like, for messages


class Prompt(NamedTuple):
    """A text that is answered: a prompt of the behaviour, or a neutral one."""

    text: str
    group: str = ""
    id: str = ""


Item = Pair | Choice
UNITS = {"margin": "nats per token", "log-odds": "nats"}  # of the figures of pairs and of choices
_QUOTED = re.compile(r'"([\s\S]+)"')


@dataclass(frozen=True)
class Suite:
    """The data of an evaluation: items that are scored, prompts that are answered, and neutral prompts.

    `digests` are those of the files it was read from, by name; `notes` are sentences for people.
    """

    name: str
    items: tuple[Item, ...]
    prompts: tuple[Prompt, ...] = ()
    neutral: tuple[Prompt, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, side: Side) -> list[Item]:
        """The items for development, or those of the test."""
        return [item for item in self.items if item.side == side]


def groups_of(items: Sequence[Item]) -> list[str]:
    """The group of each item; an item without one is a group of its own, by its id."""
    return [item.group or f"item {item.id or index}" for index, item in enumerate(items)]


def is_grouped(items: Sequence[Item]) -> bool:
    """Whether any item carries a group, so that items are resampled in clusters."""
    return any(item.group for item in items)


def strata_of(items: Sequence[Item]) -> list[str] | None:
    """The answer that shows the behaviour, of each item, where all items have the same answers (yes and no), so that
    each answer must count equally; else None. See `probes.statistics.strata`."""
    positive, negative = [], []
    for item in items:
        if isinstance(item, Pair):
            one, others = item.positive.completion, [item.negative.completion]
        else:
            one, others = item.options[item.positive], [o for i, o in enumerate(item.options) if i != item.positive]
        positive.append(one.strip())
        negative.append([other.strip() for other in others])
    return answer_strata(positive, negative)


def metric_of(item: Item) -> str:
    """The name of an item's figure."""
    return "margin" if isinstance(item, Pair) else "log-odds"


def examples_of(item: Item) -> list[Example]:
    """The examples that an item holds: of a choice also the statement that its question quotes."""
    if isinstance(item, Pair):
        return [item.positive, item.negative]
    quoted = _QUOTED.search(item.question)
    return [
        *(Example(option, item.question) for option in item.options),
        Example(item.question),
        *([Example(quoted[1])] if quoted else []),
    ]
