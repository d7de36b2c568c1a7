"""Splits: which examples are trained or extracted on, and which are held out. Content decides, never the order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.data.examples import Example, Message
from probes.seeds import child_seed

FOLDS = 5
HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 64


def folds(
    positive: Sequence[Example], negative: Sequence[Example], seed: int, paired: bool = False
) -> tuple[Tensor, Tensor]:
    """The fold of each example, int64 [n] and [m], counted from 0 and balanced within each class.

    Examples with the same context (or, without one, the same text) are never on both sides of a split, as long as there
    are as many contexts as folds; nor, where they are `paired`, are the two of a pair. Nor are those of a `group`,
    where there are some: then there may be fewer folds. A fold follows from an example's content, not from its place in
    the file.
    """
    count = min(FOLDS, len(positive), len(negative))
    both, half = (*positive, *negative), len(positive)
    contexts = [_stripped(e.context) for e in both]
    texts = [(_stripped(e.context), e.completion.strip()) for e in both]
    attempts: list[Sequence[object]] = [contexts] if None not in contexts and len(set(contexts)) >= count else []
    attempts.append(texts)  # a few large groups: better a split by example than a fold of one class
    if any(e.group for e in both):
        numbers = _groups(_joined(texts, [e.group for e in both]), half, seed, paired)
        for fewer in range(count, 1, -1):
            folds = _balanced(numbers, half, fewer)
            if folds is not None:
                return folds
    for keys in attempts:
        folds = _balanced(_groups(keys, half, seed, paired), half, count)
        if folds is not None:
            return folds
    if paired:  # texts that many pairs share make large groups too
        pairs = list(zip(texts[:half], texts[half:], strict=True))
        folds = _balanced(_groups([*pairs, *pairs], half, seed, False), half, count)
        if folds is not None:
            return folds
    # Nothing but repetitions of a few examples: no split is honest, this one at least is even.
    return torch.arange(half) % count, torch.arange(len(negative)) % count


def _stripped(context: str | tuple[Message, ...] | None) -> object:
    """A context without the white space around it, or around its turns: copies that differ in it are copies."""
    if isinstance(context, str):
        return context.strip()
    return context and tuple(message._replace(content=message.content.strip()) for message in context)


def _joined(keys: Sequence[object], groups: Sequence[str]) -> list[object]:
    """A key for each example, which is the same for all that share a key or a group, directly or through others."""
    parts: dict[object, set[object]] = {}
    for key, group in zip(keys, groups, strict=True):
        names: list[object] = [("key", key), *([("group", group)] if group else [])]
        union = set[object]().union(*(parts.get(name, {name}) for name in names))
        for name in union:
            parts[name] = union
    names_of = {id(union): tuple(sorted(map(repr, union))) for union in parts.values()}
    return [names_of[id(parts[("key", key)])] for key in keys]


def _groups(keys: Sequence[object], half: int, seed: int, paired: bool) -> list[int]:
    """The group of each example, by a number that follows from content: equal keys, and the two of a pair, together."""
    numbers = {key: child_seed(seed, "fold", key) for key in set(keys)}
    groups = [numbers[key] for key in keys]
    if not paired:
        return groups
    leader = {number: number for number in groups}

    def lead(number: int) -> int:
        while leader[number] != number:
            number = leader[number] = leader[leader[number]]
        return number

    for a, b in zip(groups[:half], groups[half:], strict=True):
        low, high = sorted((lead(a), lead(b)))
        leader[high] = low
    return [lead(number) for number in groups]


def _balanced(groups: Sequence[int], half: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Whole groups dealt to `count` folds, balanced within each class; None when a fold would lack a class."""
    sizes = {g: [0, 0] for g in sorted(set(groups))}
    for index, g in enumerate(groups):
        sizes[g][index >= half] += 1
    filled = [[0, 0] for _ in range(count)]
    chosen: dict[int, int] = {}
    for g in sorted(sizes, key=lambda g: -sum(sizes[g])):  # large groups first, so that the small ones can level
        n, m = sizes[g]
        best = min(range(count), key=lambda f: (filled[f][0] if n else 0) + (filled[f][1] if m else 0))
        filled[best][0] += n
        filled[best][1] += m
        chosen[g] = best
    if any(0 in sides for sides in filled):
        return None
    folds = torch.tensor([chosen[g] for g in groups])
    return folds[:half], folds[half:]


def held_out_split(digests: Sequence[str], share: float = HELD_OUT_SHARE) -> tuple[list[int], list[int]]:
    """The indices to train on and those to hold out: a share by digest, at least one and at most `HELD_OUT_MOST`.

    Copies never cross the split: of examples with equal digests all are for training, or the first is held out and the
    others are in neither list.
    """
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    order, count = sorted(first), len(first)
    size = min(max(1, round(count * share)), HELD_OUT_MOST, count - 1)
    held_out = {*order[:size]}
    return [i for i, digest in enumerate(digests) if digest not in held_out], sorted(first[each] for each in held_out)
