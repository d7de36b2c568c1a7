"""The parts of example files in a sweep that extracts: to extract from, to choose by, and to test on. Content decides.

An example's part follows from the seed and a hash of its prompt (or its text), so it never changes parts, and answers
to one prompt stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from probes.data.examples import Example
from probes.data.reading import Contrast
from probes.seeds import child_seed
from steer.evaluation.suites.items import Pair
from steer.evaluation.suites.sides import content_of, identifier, subject_of
from vectors.errors import ExampleError
from vectors.storage.files import digest_json

SHARES = {"extraction": 6, "dev": 2, "test": 2}  # of ten
MOST_ITEMS = 64  # of a side: the first by hash


class Parts(NamedTuple):
    """The examples to extract from, and the pairs of the two sides."""

    extraction: Contrast
    dev: list[Pair]
    test: list[Pair]


def parts_of(contrast: Contrast, seed: int) -> Parts:
    """The parts of a contrast. Raises ExampleError for one that is too small for three."""
    if contrast.paired:
        part = [part_of(example, seed) for example in contrast.positive]
        rows = list(zip(contrast.positive, contrast.negative, strict=True))
        of = {name: [row for row, p in zip(rows, part, strict=True) if p == name] for name in SHARES}
        extraction = contrast._replace(
            positive=[p for p, _ in of["extraction"]], negative=[n for _, n in of["extraction"]]
        )
        sides = {name: [Pair(p, n) for p, n in of[name]] for name in ("dev", "test")}
    else:
        by_class = [
            {name: [e for e in examples if part_of(e, seed) == name] for name in SHARES}
            for examples in (contrast.positive, contrast.negative)
        ]
        extraction = contrast._replace(positive=by_class[0]["extraction"], negative=by_class[1]["extraction"])
        sides = {
            name: [Pair(p, n) for p, n in zip(*(_ordered(each[name], seed) for each in by_class), strict=False)]
            for name in ("dev", "test")
        }
    named = {
        name: sorted(
            (pair._replace(side=name, id=identifier(pair)) for pair in pairs),  # type: ignore[arg-type]
            key=lambda pair: child_seed(seed, "item", pair.id),
        )[:MOST_ITEMS]
        for name, pairs in sides.items()
    }
    empty = [name for name, pairs in named.items() if not pairs]
    if not (extraction.positive and extraction.negative):
        empty.insert(0, "extraction")
    if empty:
        count = f"{len(contrast.positive)} + {len(contrast.negative)} examples"
        raise ExampleError(
            f"{count} leave nothing for: {', '.join(empty)}", "a sweep needs about 20 examples of each class, or more"
        )
    return Parts(extraction, named["dev"], named["test"])


def part_of(example: Example, seed: int) -> str:
    """The part of an example: extraction, dev or test."""
    number = child_seed(seed, "part of a sweep", digest_json(subject_of(example))) % sum(SHARES.values())
    for name, share in SHARES.items():
        number -= share
        if number < 0:
            return name
    raise AssertionError


def _ordered(examples: Sequence[Example], seed: int) -> list[Example]:
    """Examples by a hash of their content, each once."""
    by_content = {digest_json(content_of(each)): each for each in examples}
    return [by_content[key] for key in sorted(by_content, key=lambda key: child_seed(seed, "partner", key))]
