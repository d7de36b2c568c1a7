"""Whether a linear probe reads the behaviour in a text, from the activations of the unsteered model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored
from vectors.errors import UsageError
from vectors.registry.options import option
from vectors.storage.files import digest_file

if TYPE_CHECKING:
    from probes.readouts.scoring import Pool

SUMMARY = "share of responses in which a linear probe reads the behaviour"
SOURCE = "Alain & Bengio 2016, arXiv:1610.01644"
UNIT = "share of texts"
GRADED = False
EMPTY = "the response holds no token that counts"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The probe, the layer that is read, and how the scores of tokens become one of the response."""

    file: Path = option(help="A probe, as `steer probe train` writes it.")
    layer: int | None = option(None, help="The layer; by default the one that the probe recommends.", low=0)
    threshold: float | None = option(None, help="The score above which a response counts; by default the probe's.")
    pool: str = option("mean", help="The mean, the greatest or the last score of the response's tokens.",
                       choices=("mean", "max", "last"))  # fmt: skip


def problems_of(settings: Settings) -> list[str]:
    """Why the probe can't be read. Raises ArtifactError too."""
    from vectors.probe import Probe

    probe = Probe.load(settings.file)
    probe.at(settings.layer)
    return [] if probe.site == "resid_post" else [f"the probe reads {probe.site}, not the residual stream"]


def inputs_of(settings: Settings) -> dict[str, str]:
    """The digest of the probe."""
    return {str(settings.file): digest_file(settings.file)}


def score(settings: Settings, texts: Sequence[GeneratedText], resources: Resources) -> list[Scored]:
    """1 where the pooled score lies above the threshold; the score, which is the log-odds, is the evidence.

    Raises UsageError without a model, and for a probe of another one.
    """
    from probes.data.examples import Example
    from probes.models.tokens import tokenise
    from probes.readouts.scoring import text_scores
    from vectors.probe import Probe

    probe = Probe.load(settings.file)
    layer = probe.layer if settings.layer is None else settings.layer
    threshold = probe.threshold_at(layer) if settings.threshold is None else settings.threshold
    if resources.loaded is None:
        raise UsageError(f"the probe {settings.file} needs the model that it reads", "give a model")
    digest, expected = resources.loaded.identity.get("digest"), probe.base.get("digest")
    if expected and digest and expected != digest:
        raise UsageError(
            f"the probe {settings.file} was trained on {probe.base.get('name', 'another model')}, whose digest differs",
            "train one on this model: steer probe train",
        )
    tokenizer = resources.loaded.tokenizer
    filled = [index for index, text in enumerate(texts) if text.response.strip()]
    # Each by itself: a prompt that holds a special token is rendered already, and another is not.
    examples = [Example(texts[index].response, texts[index].prompt) for index in filled]
    tokens = [tokenise([example], tokenizer, "completion", truncate=True)[0] for example in examples]
    if not tokens:
        return [Scored(None, reason=EMPTY) for _ in texts]
    readouts = {layer: probe.at(layer)}
    scores = text_scores(
        resources.loaded.model, tokens, readouts, pool=cast("Pool", settings.pool), on_event=resources.on_event
    )
    values = dict(zip(filled, scores[:, 0].tolist(), strict=True))
    return [
        Scored(float(values[index] > threshold), int(values[index] > threshold), {"score": values[index]})
        if index in values
        else Scored(None, reason=EMPTY)
        for index in range(len(texts))
    ]
