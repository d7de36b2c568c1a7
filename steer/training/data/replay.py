"""General data: what ties the student to the base where the behaviour should not show, and keeps it from forgetting.

From a file, or the model's own continuations of openings of many kinds (self-replay). Either way the base's own
distribution is what is to be predicted, not the text alone.
"""

from __future__ import annotations

from probes.data import prompts
from probes.generation import generate
from probes.models.completions import Completion, completions_of
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from steer.training.bake import Tell
from steer.training.data import files, samples
from steer.training.data.samples import GENERAL, Sample
from vectors.files import digest_json

HELD = 8  # samples that are held out


def general_samples(
    mix: files.Mix, loaded: LoadedModel, behaviour: int, tokens: int, seed: int, tell: Tell
) -> tuple[list[Sample], list[Sample]]:
    """As many general samples as give their share beside `behaviour` others, and a few held out; none for share 0."""
    count = round(behaviour * mix.share / (1 - mix.share))
    if not count:
        return [], []
    tell({"stage": "preparing general data"})
    if mix.path is not None:
        examples, _ = files.examples_of(mix.path, "--mix")
        rows = completions_of(examples, loaded.tokenizer, context_length(loaded.model.config))
        rows = sorted(rows, key=lambda row: digest_json([seed, row.ids]))[: count + HELD]
        held, rows = rows[: min(HELD, len(rows) // 4)], rows[min(HELD, len(rows) // 4) :]
        rows = (rows * -(-count // len(rows)))[:count]  # a short file comes again, so that the share is what was asked
    else:
        held = _continued(loaded, prompts.general(held_out=True)[:HELD], HELD, tokens, seed)
        rows = _continued(loaded, prompts.general(held_out=False), count, tokens, seed)
    made = samples.soft_targets(loaded.model, rows, rows, kind=GENERAL)
    return made, samples.soft_targets(loaded.model, held, held, kind=GENERAL)


def _continued(loaded: LoadedModel, openings: list[str], count: int, tokens: int, seed: int) -> list[Completion]:
    """`count` continuations by the model itself, of the openings in turn."""
    names = [f"{openings[i % len(openings)]} {i}" for i in range(count)]
    ids = [list(loaded.tokenizer(openings[i % len(openings)])["input_ids"]) for i in range(count)]
    completions = generate(
        loaded.model, loaded.tokenizer, ids, max_tokens=tokens, temperature=1.0, seed=seed, names=names
    )
    return [completion for completion in completions if completion.completion_ids]
