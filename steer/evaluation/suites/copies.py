"""Copies in a suite: items of one content have one figure, so they count as one, whatever their ids and groups."""

from __future__ import annotations

from collections.abc import Sequence

from steer.evaluation.suites.items import Choice, Item
from steer.evaluation.suites.sides import content_of
from vectors.storage.files import digest_json

SHOWN = 3  # contents that are named, and ids of each


def without_copies(items: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """The first item of each content, in the order given, and a note that names those that others repeat.

    A copy that is counted again lets every interval shrink, though it tells nothing. Of copies in different groups the
    first one counts too, since else the groups would not be independent of each other.
    """
    by_content: dict[str, list[Item]] = {}
    for item in items:
        by_content.setdefault(_content(item), []).append(item)
    repeated = [same for same in by_content.values() if len(same) > 1]
    notes = []
    if repeated:
        left_out = sum(len(same) - 1 for same in repeated)
        more = [f"{len(repeated) - SHOWN} more"] if len(repeated) > SHOWN else []
        listed = ", ".join([*map(_named, repeated[:SHOWN]), *more])
        notes.append(
            f"{left_out} item{'s'[: left_out != 1]} of the suite repeat{'s'[: left_out == 1]} the content of another, "
            f"which counts once: {listed}"
        )
    return [same[0] for same in by_content.values()], notes


def shown(item: Item) -> str:
    """The beginning of an item's text, for people."""
    text = item.question if isinstance(item, Choice) else item.positive.completion
    return text.strip()[:60]


def _content(item: Item) -> str:
    """A digest of what an item's figure depends on: of a choice, whose options are asked in both orders, either one."""
    if isinstance(item, Choice):
        options = [option.strip() for option in item.options]
        either = min(options, options[::-1])
        return digest_json(["choice", item.question.strip(), either, options[item.positive], item.letters])
    return digest_json(["pair", content_of(item.positive), content_of(item.negative)])


def _named(same: Sequence[Item]) -> str:
    ids = list(dict.fromkeys(item.id for item in same))
    groups = list(dict.fromkeys(item.group for item in same))
    facts = [f"ids {', '.join(ids[:SHOWN])}{', …' if len(ids) > SHOWN else ''}"] if len(ids) > 1 else []
    if len(groups) > 1:
        facts.append(
            f"in {len(groups)} groups, of which {groups[0]!r} counts" if groups[0] else "the first has no group"
        )
    return f"{shown(same[0])!r} stands {len(same)} times" + (f" ({'; '.join(facts)})" if facts else "")
