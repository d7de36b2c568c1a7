"""What is measured on, never trained on: neutral text that the base continues, examples of a trait and its opposite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probes.examples import Example
from probes.examples.reading import read
from probes.model import LoadedModel
from probes.residual import text_part
from steer.baking import comparing, data, prompts, sampling
from steer.baking.comparing import Row
from steer.baking.evaluation import Held
from steer.baking.samples import Sample

NEUTRAL_TOKENS = 32


def held(
    loaded: LoadedModel, behaviour: Sequence[Sample] = (), *, taught: bool = False, pos: Path | None = None,
    neg: Path | None = None, last: int = 0, seed: int = 0,
) -> Held:  # fmt: skip
    """All of it, with what the base says of neutral text. `taught`: the samples of the behaviour are a teacher's.

    `last` takes so many of each side's examples, from the end; 0 all. Raises ExampleError.
    """
    neutral = neutral_rows(loaded, seed)
    base = dict(comparing.completions(loaded.model, neutral))
    return Held(behaviour, taught, neutral, base, *(sides(loaded, pos, neg, last=last) if pos and neg else ([], [])))


def sides(
    loaded: LoadedModel, pos: Path, neg: Path, *, last: int = 0,
    told: Callable[[Example, Any], Example] = lambda example, _: example,
) -> list[list[Row]]:  # fmt: skip
    """The examples that show the trait, and those of its opposite, as a teacher is `told` them."""
    contrast = read(pos, neg)
    longest = getattr(text_part(loaded.model.config), "max_position_embeddings", None)
    return [
        data.rows([told(example, loaded.tokenizer) for example in side[-last:]], loaded.tokenizer, longest)
        for side in (contrast.positive, contrast.negative)
    ]


def neutral_rows(loaded: LoadedModel, seed: int) -> list[Row]:
    """Texts of other kinds than conversation, which the base itself continues."""
    texts = prompts.general(held_out=True)
    ids = [list(loaded.tokenizer(text)["input_ids"]) for text in texts]
    found = sampling.sample(
        loaded.model, loaded.tokenizer, ids, tokens=NEUTRAL_TOKENS, temperature=1.0, seed=seed, names=texts
    )
    return [row for row in found if len(row.ids) > row.prompt]
