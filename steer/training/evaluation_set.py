"""What is measured on, never trained on: neutral text that the base continues, examples of a trait and its opposite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probes.data import prompts
from probes.data.reading import read
from probes.models.loading import LoadedModel
from probes.models.residual import text_part
from probes.scores import divergence
from probes.scores.divergence import Row
from steer.training.data import files, sampling
from steer.training.data.samples import Sample
from steer.training.data.teachers import Told
from steer.training.evaluation import Held

NEUTRAL_TOKENS = 32


Sides = tuple[list[Row], list[Row]]  # examples that show a trait, and those of its opposite


def held(
    loaded: LoadedModel, shown: Sides, behaviour: Sequence[Sample] = (), *, taught: bool = False, seed: int = 0
) -> Held:
    """All of it, with what the base says of neutral text. `taught`: the samples of the behaviour are a teacher's."""
    neutral = neutral_rows(loaded, seed)
    base = dict(divergence.completions(loaded.model, neutral))
    return Held(behaviour, taught, neutral, base, *shown)


def sides(loaded: LoadedModel, pos: Path | None, neg: Path | None, *, last: int = 0, told: Told | None = None) -> Sides:
    """The examples of both files, or none where there are none; of each side the last ones only, if so many are asked.

    `told` gives them as a teacher sees them, or None where it can't. Raises ExampleError.
    """
    if not (pos and neg):
        return [], []
    contrast = read(pos, neg)
    longest = getattr(text_part(loaded.model.config), "max_position_embeddings", None)
    found: list[list[Row]] = []
    for side in (contrast.positive, contrast.negative):
        examples = list(side[-last:])
        seen = examples if told is None else told(examples, loaded.tokenizer)
        if seen is None:
            return [], []
        found.append(files.rows(seen, loaded.tokenizer, longest))
    return found[0], found[1]


def neutral_rows(loaded: LoadedModel, seed: int) -> list[Row]:
    """Texts of other kinds than conversation, which the base itself continues."""
    texts = prompts.general(held_out=True)
    ids = [list(loaded.tokenizer(text)["input_ids"]) for text in texts]
    found = sampling.sample(
        loaded.model, loaded.tokenizer, ids, tokens=NEUTRAL_TOKENS, temperature=1.0, seed=seed, names=texts
    )
    return [row for row in found if len(row.ids) > row.prompt]
