"""What a judge is asked about one text, and how its ratings are read: concept, instruction and fluency, 0 to 2 each.

The three questions and their harmonic mean are those of AxBench (Wu et al. 2025, arXiv:2501.17148, section 4.2); the
words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

ASPECTS = ("concept", "instruction", "fluency")
HIGHEST = 2

# Small models leave the brackets out, which is as clear.
_RATING = re.compile(r"rating\W{0,8}?(-?\d{1,9}(?:\.\d{1,9})?)(?!\w)", re.IGNORECASE)
# Up to the last closing tag: some templates write the opening one into the prompt.
_REASONING = re.compile(r"^.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)

_QUESTIONS = {
    "concept": """You rate how clearly a response shows a concept. Judge the concept alone: grammar, coherence and
whether the response answers the instruction do not matter.

{concept}{response}Explain in one or two sentences which words of the response show the concept, or that none do.
Then rate:
0 - the concept does not appear
1 - the concept appears weakly, awkwardly or only in part
2 - the concept is clearly and fully there""",
    "instruction": """You rate how far a response follows an instruction. Judge the relation of the response to the
instruction alone: grammar and style do not matter, and a response that stops early loses nothing.

{instruction}{response}Explain in one or two sentences how the response relates to the instruction. Then rate:
0 - the response has nothing to do with the instruction
1 - the response touches the instruction, but answers it little or only in part
2 - the response answers the instruction""",
    "fluency": """You rate how fluent a response is. Judge the language alone: what it says, whether it is right,
and whether it stops early do not matter.

{response}Describe its language in one or two sentences: unnatural phrases, faults of grammar, repetitions. Then rate:
0 - it is broken: unreadable, or it repeats itself
1 - it can be read, but is unnatural or has faults
2 - it is fluent""",
}  # fmt: skip
FORMAT = (
    'End with the rating alone on the last line, in exactly this form: "Rating: [[score]]", such as "Rating: [[1]]".'
)


class Rated(NamedTuple):
    """The three ratings of one text; None where one could not be read."""

    concept: int | None
    instruction: int | None
    fluency: int | None

    @property
    def combined(self) -> float | None:
        """Their harmonic mean, zero if any is zero; None if any is missing."""
        return None if None in self else harmonic_mean([float(rating) for rating in self if rating is not None])


def question(aspect: str, *, concept: str, instruction: str, response: str) -> str:
    """The prompt that asks for the rating of one aspect; texts stand between marks, which no text can close."""
    blocks = {
        "concept": block("concept", concept),
        "instruction": block("instruction", instruction),
        "response": block("response", response),
    }
    return f"{_QUESTIONS[aspect].format(**blocks)}\n\n{FORMAT}"


def block(name: str, text: str) -> str:
    """A text between marks with its name; marks inside of it are defused."""
    safe = re.sub(rf"\[(/?)({name})\]", r"(\1\2)", text, flags=re.IGNORECASE)
    return f"[{name}]\n{safe}\n[/{name}]\n\n"


def rating(answer: str) -> int | None:
    """The rating in an answer: the last one behind the reasoning; None where it is none of 0, 1 and 2, or missing."""
    found = _RATING.findall(without_reasoning(answer))
    return int(found[-1]) if found and found[-1] in ("0", "1", "2") else None


def without_reasoning(answer: str) -> str:
    """An answer without what stands in tags of reasoning."""
    return _REASONING.sub("", answer)


def harmonic_mean(ratings: Sequence[float]) -> float:
    """n / sum(1 / r), and zero if any is zero: no aspect makes up for another that fails."""
    return 0.0 if 0 in ratings else len(ratings) / sum(1 / rating for rating in ratings)
