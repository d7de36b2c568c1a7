"""Examples that occur in two of the sets that must not share any: extraction, training, replay and held-out data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from probes.data.examples import Example, Message
from vectors.documents.artifacts import SKETCH
from vectors.storage.files import digest_json

SHORT = 16  # hexadecimal digits of a recorded digest


def example_digest(example: Example) -> str:
    """The digest of an example's turns: a prompt has that of a conversation with this one user turn.

    White space around a turn does not count, since chat templates strip it.
    """
    return digest_json([_turns(example), example.completion.strip()])


def prompt_digest(example: Example) -> str | None:
    """The digest of what comes before an example's completion; None for a plain text."""
    turns = _turns(example)
    return digest_json([turns]) if turns else None


def _turns(example: Example) -> list[list[str]]:
    context = example.context
    messages = (Message("user", context),) if isinstance(context, str) else context or ()
    return [[message.role, message.content.strip()] for message in messages]


def record(examples: Sequence[Example]) -> dict[str, list[str]]:
    """What a vector records of the examples that it was extracted from, so that they are recognised in any file.

    Of many examples these are the smallest digests, a sample in which another file's copies are found as well.
    """
    prompts = {digest for example in examples if (digest := prompt_digest(example)) is not None}
    return {
        "example_digests": _sketch({example_digest(example) for example in examples}),
        "prompt_digests": _sketch(prompts),
    }


def recorded_examples(data: Any, examples: Sequence[Example]) -> list[Example]:
    """Those of `examples` that a vector with these `data` in its metadata was extracted from, as far as recorded."""
    known = _recorded(data, "example_digests")
    return [example for example in examples if _short(example_digest(example)) in known]


def recorded_prompts(data: Any, prompts: Sequence[str]) -> list[str]:
    """Those of `prompts` that are the prompts of examples of a vector with these `data` in its metadata."""
    known = _recorded(data, "prompt_digests")
    return [prompt for prompt in prompts if _short(prompt_digest(Example("", prompt)) or "") in known]


def _sketch(digests: Collection[str]) -> list[str]:
    return sorted(map(_short, digests))[:SKETCH]


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:SHORT]


def _recorded(data: Any, key: str) -> frozenset[str]:
    listed = data.get(key) if isinstance(data, Mapping) else None
    return frozenset(each for each in listed if isinstance(each, str)) if isinstance(listed, list) else frozenset()


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
