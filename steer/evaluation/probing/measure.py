"""`steer probe test`, as a function: a probe on examples that it was not trained on, in and out of its distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from probes.data.reading import Contrast, Source, read
from probes.models.loading import LoadedModel, require_devices
from probes.readouts.calibration import Bin, curve
from probes.readouts.figures import Figures, of_classes
from probes.readouts.scoring import Pool, text_scores
from probes.readouts.texts import require_tokens, tokenised
from steer.evaluation.probing import opening
from steer.evaluation.probing.examples import parameters_of, require_unseen
from vectors.errors import SteerError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.probe import Probe

IN, OUT = "in distribution", "out of distribution"


class MeasuredSet(NamedTuple):
    """One set of examples: the figures and the calibration curve, and how many examples of each class there are."""

    figures: Figures
    curve: list[Bin]
    examples: dict[str, int]


class Measurement(NamedTuple):
    """A probe's figures by the name of the set: `IN`, and `OUT` where there is one."""

    layer: int
    threshold: float
    sets: dict[str, MeasuredSet]
    tokens: str
    pool: str
    warnings: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """What `steer probe test --json` prints."""
        sets = {
            name: {
                **each.figures.numbers(),
                "examples": each.examples,
                "calibration": [bin_._asdict() for bin_ in each.curve],
            }
            for name, each in self.sets.items()
        }
        drop = {}
        if OUT in self.sets:
            inside, outside = (self.sets[name].figures for name in (IN, OUT))
            drop = {
                "auroc": round(outside.auroc - inside.auroc, 4),
                "cross_entropy": round(outside.cross_entropy - inside.cross_entropy, 4),
            }
        return {
            "layer": self.layer, "threshold": self.threshold, "tokens": self.tokens, "pool": self.pool,
            "sets": sets, "out_of_distribution_less_in": drop or None, "warnings": list(self.warnings),
        }  # fmt: skip


def measure(
    probe: str | Path | Probe,
    pos: Source | None = None,
    neg: Source | None = None,
    *,
    pairs: Source | None = None,
    ood_pos: Source | None = None,
    ood_neg: Source | None = None,
    ood_pairs: Source | None = None,
    layer: int | None = None,
    threshold: float | None = None,
    model: str | Path | LoadedModel | None = None,
    tokens: str | None = None,
    pool: str | None = None,
    allow_overlap: bool = False,
    any_base: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> Measurement:
    """Test a probe on examples in its distribution, and on others out of it where they are given.

    `layer`, `threshold`, `tokens` and `pool` are the probe's, unless given. Examples that it was trained on are refused
    unless `allow_overlap`. `errors` are problems that were found before.

    Raises ExampleError, ArtifactError, ModelError, UsageError.
    """
    errors = [] if errors is None else errors
    sets: dict[str, Contrast] = {}
    chosen = None
    with collecting(errors):
        chosen = opening.read_probe(probe)
    with collecting(errors):
        sets[IN] = read(pos, neg, pairs)
    if any(source is not None for source in (ood_pos, ood_neg, ood_pairs)):
        with collecting(errors):
            sets[OUT] = read(ood_pos, ood_neg, ood_pairs)
    require_devices(device, dtype, errors)
    warnings: list[str] = []
    if chosen is not None:
        with collecting(errors):
            which, pooling = parameters_of(chosen, tokens, pool)
            require_tokens(which)
        with collecting(errors):
            number = chosen.layer if layer is None else layer
            readout = {number: chosen.at(number)}
        opening.require_site(chosen.site, errors)
        for name, contrast in sets.items():
            with collecting(errors):
                both = [*contrast.positive, *contrast.negative]
                warnings += require_unseen(chosen, both, f"the test {name}", allow_overlap)
    right = not errors
    readers: list[tuple[str, opening.Reader]] = [] if chosen is None else [(opening.name_of(probe), chosen)]
    opened = opening.open_for(readers, model, errors, any_base=any_base)
    texts = {}
    if opened is not None and right:
        for name, contrast in sets.items():
            with collecting(errors):
                both = [*contrast.positive, *contrast.negative]
                texts[name] = tokenised(both, opened.tokenizer, which, longest=opened.context_length)
    raise_together(errors)
    assert chosen is not None
    assert opened is not None
    if threshold is None:
        warnings += _of_other_scores(chosen, number, which, pooling)
    ready = opening.loaded(opened, device, dtype, on_event)
    states = opening.states_of(ready, chosen.site, [number])
    limit = chosen.threshold_at(number) if threshold is None else threshold
    results = {}
    for name, contrast in sets.items():
        scores = text_scores(states, texts[name], readout, pool=pooling, on_event=on_event)[:, 0]
        half = len(contrast.positive)
        groups = [example.group for example in (*contrast.positive, *contrast.negative)]
        found, every, labels = of_classes(scores[:half], scores[half:], limit, seed, groups)
        counts = {"positive": half, "negative": len(contrast.negative)}
        results[name] = MeasuredSet(found, curve(every, labels), counts)
    return Measurement(number, limit, results, which, pooling, tuple(warnings))


def _of_other_scores(probe: Probe, layer: int, tokens: str, pool: Pool) -> list[str]:
    """A sentence on a layer's threshold that `steer probe gate` chose on other scores than those of the test."""
    chosen = probe.metadata.get("gate") or {}
    if chosen.get("layer") != layer:
        return []
    by_token = chosen.get("unit") == "token"
    was = (chosen.get("tokens", tokens), "each by itself" if by_token else chosen.get("pool", pool))
    if was == (tokens, pool):
        return []
    return [
        f"the threshold of layer {layer} was chosen on other scores ({', '.join(map(str, was))}) "
        f"than those of the test ({tokens}, {pool}), so counts above it say little of the gate"
    ]
