"""The tokens with which a model begins and ends its thinking and its calls of tools, and what lies between them.

Whether a token lies inside is a function of the tokens up to it: it does if the last marker among them is one that
begins. So the marker that begins is inside, and the one that ends is outside; behind a prompt that ends inside, the
response begins inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vectors.expression import Condition

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
TOOLS = (
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


@dataclass(frozen=True)
class Markers:
    """The ids of tokens that begin and that end thinking, and calls of tools; empty where there are none."""

    thinking: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    tools: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def of(self, section: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The markers that a section depends on."""
        return self.thinking if WHAT[section] == "thinking" else self.tools


def markers_of(tokenizer: Any, given: Mapping[str, Sequence[str]] | None = None) -> Markers:
    """The markers of a model: those of known forms that are tokens of their own in its tokenizer.

    `given` names others, by thinking and tools: the text that begins and the one that ends. Raises ValueError for one
    that is no token of its own.
    """
    vocabulary = tokenizer.get_vocab()
    found = {}
    for what, known in (("thinking", THINKING), ("tools", TOOLS)):
        pairs: Sequence[Sequence[str]] = known
        if given and what in given:
            pairs = [given[what]]
            missing = [text for text in given[what] if text and text not in vocabulary]
            if missing:
                raise ValueError(f"the marker {missing[0]!r} of {what} is not one token of the model's tokenizer")
        whole = [pair for pair in pairs if all(text in vocabulary for text in pair if text)]
        found[what] = tuple(
            tuple(dict.fromkeys(vocabulary[pair[side]] for pair in whole if pair[side])) for side in (0, 1)
        )
    return Markers(**found)  # type: ignore[arg-type]


def problems_of_sections(conditions: Sequence[Condition], markers: Markers | None) -> list[str]:
    """Every section (@answer, @thinking, @outside-tools) that a model without the markers for it can't tell."""
    return [
        f"{each} needs the model's markers of {WHAT[each.kind]}, and none of the known ones "
        f"({_known(WHAT[each.kind])}) is a token of its tokenizer"
        for each in conditions
        if each.is_section and not (markers or Markers()).of(each.kind)[0]
    ]


def inside(ids: Tensor, real: Tensor, before: Tensor, markers: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """Which tokens lie inside, bool [batch, tokens].

    `ids` int64 and `real` bool (not padding) are [batch, tokens]; `before` bool [batch] is the state before the first.
    """
    begins, ends = (torch.isin(ids, torch.tensor(side, dtype=ids.dtype, device=ids.device)) & real for side in markers)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(begins | ends, places, -1).cummax(1).values
    return torch.where(last >= 0, begins.gather(1, last.clamp(min=0)), before[:, None])


def in_section(kind: str, inside: Any) -> Any:
    """Whether tokens are in a section, given which lie inside what it depends on."""
    return inside if kind == "thinking" else ~inside


def _known(what: str) -> str:
    return ", ".join(begin for begin, _ in (THINKING if what == "thinking" else TOOLS))
