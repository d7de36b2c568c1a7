"""Examples that stand in two sets that must not share any: training, held-out and replay data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product

from probes.data.examples import Example, Message
from vectors.storage.files import digest_json


def example_digest(example: Example) -> str:
    """The digest of what is said in an example: equal for a prompt and for a conversation of this one user turn.

    White space around a turn does not count, since chat templates strip it.
    """
    context = example.context
    messages = (Message("user", context),) if isinstance(context, str) else context or ()
    turns = [[message.role, message.content.strip()] for message in messages]
    return digest_json([turns, example.completion.strip()])


def shared(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The examples that stand among the others too."""
    digests = {example_digest(each) for each in others}
    return [each for each in examples if example_digest(each) in digests]


def problems_of_overlap(*groups: Mapping[str, Sequence[Example]]) -> list[str]:
    """A sentence for each two named sets of different groups that share examples; the later one should not hold those.

    Groups are what is trained on, what is replayed, and what is held out.
    """
    problems = []
    for group, other_group in combinations(groups, 2):
        for (name, examples), (other, others) in product(group.items(), other_group.items()):
            both = shared(others, examples)
            if both:
                problems.append(
                    f"{len(both)} of the {len(others)} examples of {other} are also in {name} "
                    f"(the first: {both[0].origin})"
                )
    return problems
