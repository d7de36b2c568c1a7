"""The tokens with which a model begins and ends its thinking and its calls of tools, and what lies between them.

Whether a token lies inside is a function of the tokens up to it: it does if the last marker among them is one that
begins. So the marker that begins is inside, and the one that ends is outside; of a marker of several tokens this is
true of its last token. Behind a prompt that ends inside, the response begins inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vectors.errors import UsageError
from vectors.expression import Condition
from vectors.language.markers import FLAG

# The text that begins and the one that ends; one of several tokens is given as these tokens.
Form = tuple[str | tuple[str, ...], str]
THINKING: tuple[Form, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    (("<|channel|>", "analysis", "<|message|>"), "<|end|>"),
)
TOOLS: tuple[Form, ...] = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("[TOOL_CALLS]", ""),  # to the end of the turn
    ("<|python_tag|>", "<|eom_id|>"),
)
WHAT = {"answer": "thinking", "thinking": "thinking", "outside-tools": "tools"}  # by section: what it depends on
LONGEST = 16  # most tokens of a marker
# A tokenizer may join a marker of several tokens with what is around it.
_BEFORE, _AFTER = ("", " ", "\n"), ("", "\n", "\n\n")

Sequences = tuple[tuple[int, ...], ...]  # markers, each as the ids of its tokens
Pair = tuple[Sequences, Sequences]  # the markers that begin, and those that end


@dataclass(frozen=True)
class Markers:
    """The markers that begin and that end thinking, and calls of tools; empty where there are none."""

    thinking: Pair = ((), ())
    tools: Pair = ((), ())

    def of(self, section: str) -> Pair:
        """The markers that a section depends on."""
        return self.thinking if WHAT[section] == "thinking" else self.tools


# For a check before the tokenizer has been read: no section is refused for lack of markers.
UNREAD = Markers((((0,),), ()), (((0,),), ()))


def markers_of(tokenizer: Any, given: Mapping[str, Sequence[str]] | None = None) -> Markers:
    """The markers of a model: those of known forms whose tokens its tokenizer has.

    `given` names others, by thinking and tools: the text that begins and the one that ends, "" for none. Text that is
    not one token is taken as the tokens that the tokenizer gives it, alone and beside spaces and line breaks. Raises
    ValueError for text that has no tokens, or too many.
    """
    vocabulary = tokenizer.get_vocab()
    pairs: dict[str, Pair] = {}
    for what, known in (("thinking", THINKING), ("tools", TOOLS)):
        if given and what in given:
            begin, end = (_sequences_of(text, tokenizer, vocabulary, what) for text in given[what])
            pairs[what] = begin, end
            continue
        forms = [tuple((side,) if isinstance(side, str) else side for side in form) for form in known]
        whole = [form for form in forms if all(text in vocabulary for text in itertools.chain(*form) if text)]
        begin, end = (
            tuple(dict.fromkeys(tuple(vocabulary[text] for text in form[side]) for form in whole if form[side][0]))
            for side in (0, 1)
        )
        pairs[what] = begin, end
    return Markers(**pairs)


def given_markers(tokenizer: Any, given: Mapping[str, Sequence[str]] | None = None) -> Markers:
    """`markers_of`, for markers that a user gives. Raises UsageError."""
    try:
        return markers_of(tokenizer, given)
    except ValueError as error:
        raise UsageError(str(error), f"{FLAG} thinking='<think>,</think>' gives others") from error


def require_sections(conditions: Sequence[Condition], markers: Markers) -> None:
    """Refuse sections that a model with these markers can't tell. Raises UsageError."""
    if problems := problems_of_sections(conditions, markers):
        raise UsageError(list(dict.fromkeys(problems)), f"give them: {FLAG} thinking=BEGIN,END, or tools=BEGIN,END")


def _sequences_of(text: str, tokenizer: Any, vocabulary: Mapping[str, int], what: str) -> Sequences:
    """The tokens of a marker, in each of the ways in which the tokenizer writes it."""
    if not text:
        return ()
    if text in vocabulary:
        return ((vocabulary[text],),)
    found = []
    for before, after in itertools.product(_BEFORE, _AFTER):
        ids = tokenizer.encode(before + text + after, add_special_tokens=False)
        stop = next((i for i in range(1, len(ids) + 1) if text in tokenizer.decode(ids[:i])), None)
        if stop is None:
            continue  # the tokenizer does not give the text back
        start = next(i for i in reversed(range(stop)) if text in tokenizer.decode(ids[i:stop]))
        found.append(tuple(ids[start:stop]))
    if not found:
        raise ValueError(f"the model's tokenizer can't write the marker {text!r} of {what}")
    if max(map(len, found)) > LONGEST:
        raise ValueError(f"the marker {text!r} of {what} has {max(map(len, found))} tokens, at most {LONGEST}")
    return tuple(dict.fromkeys(found))


def problems_of_sections(conditions: Sequence[Condition], markers: Markers | None) -> list[str]:
    """Every section (@answer, @thinking, @outside-tools) that a model without the markers for it can't tell."""
    return [
        f"{each} needs the model's markers of {WHAT[each.kind]}, and its tokenizer has none of the known ones "
        f"({_known(WHAT[each.kind])})"
        for each in conditions
        if each.is_section and not (markers or Markers()).of(each.kind)[0]
    ]


class Place(NamedTuple):
    """Where sequences are behind their last token."""

    inside: Tensor  # bool [batch]
    last: Tensor  # int64 [batch, n]: the ids of the last tokens, -1 where there is none


def inside(ids: Tensor, real: Tensor, before: Place | None, markers: Pair) -> tuple[Tensor, Place]:
    """Which tokens lie inside, bool [batch, tokens], and where the sequences are behind them.

    `ids` int64 and `real` bool (not padding) are [batch, tokens]; `before` is where they were, None at the beginning.
    """
    longest = max((len(marker) for side in markers for marker in side), default=1)
    if before is None:
        before = Place(
            torch.zeros(len(ids), dtype=torch.bool, device=ids.device), ids.new_full((len(ids), longest), -1)
        )
    whole = torch.cat([before.last, ids.masked_fill(~real, -1)], 1)
    # Padding goes to the front, for a marker of several tokens may have begun before it.
    order = (whole >= 0).int().argsort(dim=1, stable=True)
    packed = whole.gather(1, order)
    seen = torch.arange(whole.shape[1], device=ids.device) < before.last.shape[1]
    begins, ends = (_completed(packed, side) & ~seen[order] for side in markers)
    marks = begins | ends
    places = torch.arange(packed.shape[1], device=ids.device).expand_as(packed)
    last = torch.where(marks, places, -1).cummax(1).values
    state = torch.where(last >= 0, begins.gather(1, last.clamp(min=0)), before.inside[:, None])
    unpacked = torch.empty_like(state).scatter_(1, order, state)
    return unpacked[:, before.last.shape[1] :], Place(state[:, -1], packed[:, packed.shape[1] - longest :])


def _completed(ids: Tensor, markers: Sequences) -> Tensor:
    """At which tokens a marker ends, bool [batch, tokens]."""
    result = torch.zeros_like(ids, dtype=torch.bool)
    for marker in markers:
        fits = torch.ones_like(result)
        for back, token in enumerate(reversed(marker)):
            fits[:, :back] = False
            fits[:, back:] &= ids[:, : ids.shape[1] - back] == token
        result |= fits
    return result


def in_section(kind: str, inside: Any) -> Any:
    """Whether tokens are in a section, given which lie inside what it depends on."""
    return inside if kind == "thinking" else ~inside


def _known(what: str) -> str:
    forms = (begin for begin, _ in (THINKING if what == "thinking" else TOOLS))
    return ", ".join(begin if isinstance(begin, str) else "".join(begin) for begin in forms)
