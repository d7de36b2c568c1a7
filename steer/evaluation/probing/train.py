"""`steer.train_probe`: examples in, a calibrated probe out. What `steer probe train` does, as a function."""

from __future__ import annotations

from pathlib import Path

from probes.data.reading import Source, read
from probes.directions.plan import equal_tokens, layers_of
from probes.models import residual
from probes.models.loading import LoadedModel, require_devices
from probes.readouts.methods import method as find_method
from probes.readouts.scoring import require_pool
from probes.readouts.texts import require_tokens, tokenised
from probes.readouts.training import Settings, Trained
from probes.readouts.training import train as train_on
from steer.evaluation.probing import opening
from steer.extraction import require_output
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.registry.layers import parse_layers


def train(
    pos: Source | None = None,
    neg: Source | None = None,
    *,
    pairs: Source | None = None,
    model: str | Path | LoadedModel = "smollm2",
    method: str = "logistic",
    layers: str = "all",
    tokens: str = "completion",
    per_token: bool = False,
    pool: str = "mean",
    site: str = RESIDUAL,
    out: str | Path | None = None,
    seed: int = 0,
    truncate: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    errors: list[SteerError] | None = None,
    on_event: OnEvent = ignore,
) -> Trained:
    """Train a probe on two sets of examples, and measure it on held-out folds.

    Sources, `layers`, `model`, `device`, `dtype` and `out` are as of `steer.extract`; so is `tokens`, which may also be
    "prompt": the last token of the prompt as a server sees it. With `per_token` each token is an example, else the mean
    of a text's. `pool` ("mean" or "max") makes the score of a text of its tokens'; "max" needs `per_token`. `site` is
    "resid_post" or a site of TransformerLens. `errors` are problems that were found before.

    Raises ExampleError, ModelError, UsageError, OutputError, each with all problems.
    """
    errors = [] if errors is None else errors
    with collecting(errors):
        find_method(method)
    with collecting(errors):
        require_tokens(tokens)
    with collecting(errors):
        parse_layers(layers)
    with collecting(errors):
        chosen = require_pool(pool)
        if chosen != "mean" and not per_token:
            raise UsageError(f"--pool {pool} needs the scores of tokens, and each text is one mean", "add --per-token")
    opening.require_site(site, errors)
    require_devices(device, dtype, errors)
    with collecting(errors):
        contrast = read(pos, neg, pairs)
    if out is not None:
        with collecting(errors):
            require_output(Path(out), {"--pos": pos, "--neg": neg, "--pairs": pairs})
    right = not errors
    opened = opening.open_for([], model, errors)
    warnings: list[str] = []
    if opened is not None and right:
        with collecting(errors):
            wanted = layers_of(layers, int(residual.text_part(opened.config).num_hidden_layers))
        with collecting(errors):
            texts = tokenised(
                [*contrast.positive, *contrast.negative], opened.tokenizer, tokens,
                longest=opened.context_length, truncate=truncate,
            )  # fmt: skip
            warnings = equal_tokens(texts, contrast, [])
    raise_together(errors)
    assert opened is not None
    ready = opening.loaded(opened, device, dtype, on_event)
    states = None if site == RESIDUAL else opening.states_of(ready, site, wanted)
    settings = Settings(method, tokens, per_token, chosen, seed, truncate, site)
    trained = train_on(ready, contrast, texts, wanted, settings, states=states, on_event=on_event)
    trained = trained._replace(warnings=(*warnings, *trained.warnings))
    if out is not None:
        trained.probe.save(out)
    return trained
