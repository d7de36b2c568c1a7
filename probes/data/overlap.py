"""Examples that occur in two of the sets that must not share any: training, replay and held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product

from probes.data.examples import Example, Message
from vectors.storage.files import digest_json


def example_digest(example: Example) -> str:
    """The digest of an example's turns: a prompt has that of a conversation with this one user turn.

    White space around a turn does not count, since chat templates strip it.
    """
    context = example.context
    messages = (Message("user", context),) if isinstance(context, str) else context or ()
    turns = [[message.role, message.content.strip()] for message in messages]
    return digest_json([turns, example.completion.strip()])


def shared(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """Those of `examples` that occur in `others` too."""
    digests = {example_digest(each) for each in others}
    return [each for each in examples if example_digest(each) in digests]


def problems_of_overlap(*groups: Mapping[str, Sequence[Example]]) -> list[str]:
    """A sentence for each pair of sets, from two different groups, that share examples.

    A group is a mapping of sets by name: those trained on, those replayed, those held out, in this order. The sentence
    counts the shared examples in the set of the later group.
    """
    problems = []
    for group, other_group in combinations(groups, 2):
        for (name, examples), (other, others) in product(group.items(), other_group.items()):
            duplicates = shared(others, examples)
            if duplicates:
                problems.append(
                    f"{len(duplicates)} of the {len(others)} examples of {other} are also in {name} "
                    f"(the first: {duplicates[0].origin})"
                )
    return problems
