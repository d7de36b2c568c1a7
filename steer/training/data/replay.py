"""Replay data: samples on which the student must predict as the base does, so that it does not forget.

From a file, or the model's own continuations of openings of many kinds (self-replay). In both cases the targets are the
base's next-token distributions, not the tokens of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from probes.data import prompts
from probes.data.splits import held_out_split
from probes.generation import generate
from probes.models.completions import Completion, completions_of
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import plain_ids
from steer.training.data import files, samples
from steer.training.data.samples import GENERAL, Sample, Samples
from steer.training.requests import REPLAY_TOKENS, Replay, TrainingRequest
from vectors.events import Event, OnEvent
from vectors.storage.files import digest_json

HELD_OUT = 8  # samples


def replay_samples(
    replay: Replay, loaded: LoadedModel, behaviour: int, *, tokens: int, seed: int, on_event: OnEvent
) -> tuple[list[Sample], list[Sample]]:
    """Replay samples for their share beside `behaviour` others, and held-out replay samples; none for share 0."""
    count = round(behaviour * replay.share / (1 - replay.share))
    if not count:
        return [], []
    on_event(Event("preparing replay data"))
    if replay.path is not None:
        examples, _ = files.examples_of(replay.path, "--replay")
        texts = completions_of(examples, loaded.tokenizer, context_length(loaded.model.config))
        texts = list({tuple(text.ids): text for text in texts}.values())  # no copy of a held-out text is trained on
        texts = sorted(texts, key=lambda text: digest_json([seed, text.ids]))[: count + HELD_OUT]
        held_out, texts = texts[: min(HELD_OUT, len(texts) // 4)], texts[min(HELD_OUT, len(texts) // 4) :]
        # A short file is repeated, so that replay data have the requested share.
        texts = (texts * -(-count // len(texts)))[:count]
    else:
        held_out = _continued(loaded, prompts.general(held_out=True)[:HELD_OUT], HELD_OUT, tokens, seed)
        texts = _continued(loaded, prompts.general(held_out=False), count, tokens, seed)
    made = samples.soft_targets(loaded.model, texts, texts, kind=GENERAL)
    return made, samples.soft_targets(loaded.model, held_out, held_out, kind=GENERAL)


def with_replay(request: TrainingRequest, loaded: LoadedModel, made: Sequence[Sample], on_event: OnEvent) -> Samples:
    """Samples of the user's data, split into training and held out, with replay samples beside both."""
    for_training, for_validation = held_out_split([sample.digest for sample in made])
    behaviour = [made[i] for i in for_training]
    replay, replay_held = replay_samples(
        request.replay, loaded, len(behaviour), tokens=REPLAY_TOKENS, seed=request.settings.seed, on_event=on_event
    )
    counts = {"behaviour": len(behaviour), "general": len(replay)}
    return Samples([*behaviour, *replay], [*(made[i] for i in for_validation), *replay_held], counts)


def _continued(loaded: LoadedModel, openings: list[str], count: int, tokens: int, seed: int) -> list[Completion]:
    """Up to `count` continuations of the openings, in turn, by the model itself; empty ones are left out."""
    names = [f"{openings[i % len(openings)]} {i}" for i in range(count)]
    ids = plain_ids([openings[i % len(openings)] for i in range(count)], loaded.tokenizer)
    completions = generate(
        loaded.model, loaded.tokenizer, ids, max_tokens=tokens, temperature=1.0, seed=seed, names=names
    )
    return [completion for completion in completions if completion.completion_ids]
