"""`steer probe gate`, as a function: a threshold for conditional steering at a stated false-positive rate."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from probes.data.reading import Source, read_class
from probes.models.loading import LoadedModel, require_devices
from probes.readouts.gate import Gate, sides_of_negatives
from probes.readouts.gate import gate as choose
from probes.readouts.scoring import Pool, token_scores
from probes.readouts.texts import PROMPT, require_tokens, tokenised
from probes.readouts.thresholds import require_enough
from steer.evaluation.probing import opening
from steer.evaluation.probing.examples import parameters_of, require_unseen
from steer.extraction import require_output
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.probe import Probe

RESPONSE = "completion"  # of --tokens


class Gated(NamedTuple):
    """A threshold with its rates, what its scores are of, and sentences for people."""

    gate: Gate
    tokens: str
    pool: Pool
    warnings: tuple[str, ...]

    def condition(self, name: str) -> str | None:
        """The condition in an expression, such as `@when:warm>1.25`; None where `no_condition` says why not."""
        if self.no_condition is not None:
            return None
        quoted = name if name.isidentifier() else f"'{name}'"
        return f"@{'while' if self.gate.per_token else 'when'}:{quoted}>{self.gate.threshold.value:.10g}"

    @property
    def no_condition(self) -> str | None:
        """Why the rates are none of a condition, which reads other states than these scores are of; None if it does
        not.
        """
        site = self.gate.probe.site
        if site != RESIDUAL:
            return f"a condition reads {RESIDUAL}, and this probe {site}: train one without --site"
        if self.gate.per_token:
            if self.tokens == RESPONSE:
                return None
            return (
                f"@while: reads every token of a response, and these scores are of {self.tokens}: --tokens {RESPONSE}"
            )
        if self.tokens == PROMPT:
            return None
        return (
            f"@when: reads the last token of the prompt, and these scores are of other tokens ({self.tokens}, "
            f"{self.pool}): train with --tokens {PROMPT}, or choose a threshold for @while: with --per-token"
        )


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
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> Gated:
    """Choose a threshold for a false-positive rate on one half of the negatives, and report its rates on the other.

    `tokens`, `pool` and `layer` are those that the probe was trained with and recommends, unless given. With
    `per_token` each token is a decision, else each text is one. A condition reads the same states where these are the
    tokens of the completions (`@while:`) or the last one of the prompts (`@when:`). With `out`, the probe is written
    there with its threshold. `errors` are problems that were found before.

    Raises ExampleError, ArtifactError, ModelError, UsageError, OutputError.
    """
    errors = [] if errors is None else errors
    chosen = negatives = None
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
    require_devices(device, dtype, errors)
    warnings: list[str] = []
    if chosen is not None:
        with collecting(errors):
            which, pooling = parameters_of(chosen, tokens, pool)
            require_tokens(which)
        with collecting(errors):
            readout = {chosen.layer if layer is None else layer: chosen.at(layer)}
        opening.require_site(chosen.site, errors)
        for examples, flag in ((negatives or [], "--neg"), (positives or [], "--pos")):
            with collecting(errors):
                warnings += require_unseen(chosen, examples, flag, allow_overlap)
    if negatives is not None:
        with collecting(errors):
            choosing = sides_of_negatives(negatives, seed)
            if not per_token and 0 < fpr < 1:
                require_enough(sum(choosing), fpr)
    right = not errors
    readers: list[tuple[str, opening.Reader]] = [] if chosen is None else [(opening.name_of(probe), chosen)]
    opened = opening.open_for(readers, model, errors, any_base=any_base)
    if opened is not None and right:
        with collecting(errors):
            both = [*(negatives or []), *(positives or [])]
            texts = tokenised(both, opened.tokenizer, which, longest=opened.context_length)
    raise_together(errors)
    assert chosen is not None
    assert negatives is not None
    assert opened is not None
    ready = opening.loaded(opened, device, dtype, on_event)
    states = opening.states_of(ready, chosen.site, list(readout))
    scores = token_scores(states, texts, readout, on_event=on_event)
    counted = [each[text.counted, 0] for each, text in zip(scores, texts, strict=True)]
    half = len(negatives)
    found = choose(
        chosen, next(iter(readout)), fpr, (negatives, counted[:half]),
        None if positives is None else (positives, counted[half:]),
        tokens=which, pool=pooling, per_token=per_token, seed=seed,
    )  # fmt: skip
    if out is not None:
        found.probe.save(out)
    return Gated(found, which, pooling, tuple(warnings))
