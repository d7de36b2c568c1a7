"""The side of an item: for development or for the test. Its content decides, so an item never changes sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from probes.data.examples import Example, Message
from probes.seeds import child_seed
from steer.evaluation.suites.items import Choice, Item, Pair, Side
from vectors.storage.files import digest_json

DEV_SHARE = 3  # one item in so many is for development
HELD_OUT_GROUPS = 4  # one group in so many belongs to the test as a whole: templates that development never sees
FEWEST_GROUPS = 4  # groups below which none is held out


def side_of(content: object, seed: int) -> Side:
    """The side of what has this content, as JSON values."""
    return "dev" if child_seed(seed, "side", digest_json(content)) % DEV_SHARE == 0 else "test"


def content_of(example: Example) -> list[object]:
    """An example as JSON values, without the white space around its texts."""
    return [_context(example), example.role, example.completion.strip()]


def subject_of(example: Example) -> object:
    """What decides the side of an example: its context, so that answers to one prompt stay together, or its text."""
    return _context(example) if example.context else example.completion.strip()


def with_sides(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """The items with their sides by content, and those of some groups, whole, on the test's side."""
    held_out = held_out_groups([item.group for item in items], seed)
    return tuple(
        item._replace(side="test" if item.group in held_out else side_of(_subject(item), seed)) for item in items
    )


def held_out_groups(groups: Iterable[str], seed: int) -> set[str]:
    """Those of the groups that belong to the test as a whole; "" is none."""
    names = {group for group in groups if group}
    if len(names) < FEWEST_GROUPS:
        return set()
    return {group for group in names if child_seed(seed, "group", group) % HELD_OUT_GROUPS == 0}


def identifier(item: Item) -> str:
    """The `id` of an item that has none: a short digest of its content."""
    if isinstance(item, Pair):
        content: list[object] = [content_of(item.positive), content_of(item.negative)]
    else:
        content = [item.question, list(item.options), item.positive, item.letters]
    return digest_json(content).removeprefix("sha256:")[:12]


def chosen(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """At most so many of the items, chosen by a hash of their content, in the order given."""
    ranked = sorted(items, key=lambda item: child_seed(seed, "item", identifier(item)))
    wanted = {id(item) for item in ranked[:most]}
    return [item for item in items if id(item) in wanted]


def _subject(item: Item) -> object:
    if isinstance(item, Choice):
        return item.question
    return (
        [subject_of(item.positive), subject_of(item.negative)]
        if not item.positive.context
        else subject_of(item.positive)
    )


def _context(example: Example) -> object:
    context = example.context
    messages = (Message("user", context),) if isinstance(context, str) else context or ()
    return [[message.role, message.content.strip()] for message in messages]
