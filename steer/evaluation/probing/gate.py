"""`steer probe gate`, as a function: a threshold for conditional steering at a stated false-positive rate."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from probes.data.reading import Source, read_class
from probes.models.loading import LoadedModel
from probes.readouts.gate import Gate
from probes.readouts.gate import gate as choose
from probes.readouts.scoring import token_scores
from probes.readouts.texts import require_tokens, tokenised
from steer.evaluation.probing import opening
from steer.evaluation.probing.examples import parameters_of, require_unseen
from steer.extraction import require_output
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.probe import Probe


class Gated(NamedTuple):
    """A threshold with its rates, the tokens that are read, and sentences for people."""

    gate: Gate
    tokens: str
    warnings: tuple[str, ...]

    def condition(self, name: str) -> str:
        """The condition in an expression, such as `@when:warm>1.25`."""
        quoted = name if name.isidentifier() else f"'{name}'"
        return f"@{'while' if self.gate.per_token else 'when'}:{quoted}>{self.gate.threshold.value:.10g}"


def gate(
    probe: str | Path | Probe,
    neg: Source,
    pos: Source | None = None,
    *,
    fpr: float = 0.01,
    layer: int | None = None,
    model: str | Path | LoadedModel | None = None,
    tokens: str | None = None,
    pool: str | None = None,
    per_token: bool = False,
    out: str | Path | None = None,
    allow_overlap: bool = False,
    any_base: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    on_event: OnEvent = ignore,
) -> Gated:
    """Choose a threshold for a false-positive rate on one half of the negatives, and report its rates on the other.

    `tokens`, `pool` and `layer` are those that the probe was trained with and recommends, unless given. With
    `per_token` each token is a decision (`@while:`), else each text is one (`@when:`). With `out`, the probe is written
    there with its threshold. Raises ExampleError, ArtifactError, ModelError, UsageError, OutputError.
    """
    errors: list[SteerError] = []
    with collecting(errors):
        chosen = opening.read_probe(probe)
    with collecting(errors):
        if not 0 < fpr < 1:
            raise UsageError(f"the false-positive rate {fpr:g} does not lie between 0 and 1", "such as --fpr 0.01")
    with collecting(errors):
        negatives, _ = read_class(neg, "--neg")
    positives = None
    if pos is not None:
        with collecting(errors):
            positives, _ = read_class(pos, "--pos")
    if out is not None:
        with collecting(errors):
            require_output(
                Path(out), {"--pos": pos, "--neg": neg, "PROBE": None if isinstance(probe, Probe) else probe}
            )
    raise_together(errors)
    warnings: list[str] = []
    with collecting(errors):
        which, pooling = parameters_of(chosen, tokens, pool)
        require_tokens(which)
    with collecting(errors):
        readout = {chosen.layer if layer is None else layer: chosen.at(layer)}
    opening.require_site(chosen.site, errors)
    for examples, flag in ((negatives, "--neg"), (positives or [], "--pos")):
        with collecting(errors):
            warnings += require_unseen(chosen, examples, flag, allow_overlap)
    raise_together(errors)
    opened = opening.open_for({"PROBE": chosen}, model, any_base=any_base)
    both = [*negatives, *(positives or [])]
    texts = tokenised(both, opened.tokenizer, which, longest=opened.context_length)
    ready = opening.loaded(opened, device, dtype, on_event)
    states = opening.states_of(ready, chosen.site, list(readout))
    scores = token_scores(states, texts, readout, on_event=on_event)
    counted = [each[text.counted, 0] for each, text in zip(scores, texts, strict=True)]
    half = len(negatives)
    found = choose(
        chosen, next(iter(readout)), fpr, (negatives, counted[:half]),
        None if positives is None else (positives, counted[half:]),
        pool=pooling, per_token=per_token, seed=seed,
    )  # fmt: skip
    if out is not None:
        found.probe.save(out)
    return Gated(found, which, tuple(warnings))
