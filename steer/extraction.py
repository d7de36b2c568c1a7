"""`steer.extract`: examples in, a validated vector out. What the command does, as a function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from probes.arms import QUICK_BUDGET
from probes.data.reading import Contrast, Source, read
from probes.directions.extraction import Extraction
from probes.directions.extraction import extract as extract_contrast
from probes.directions.methods import method as find_method
from probes.directions.plan import plan
from probes.models.loading import LoadedModel, load, open_model, require_devices
from probes.models.tokens import choose
from steer.cluster import cluster, require_cluster
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import Event, OnEvent, ignore
from vectors.registry.layers import parse_layers
from vectors.storage.files import require_distinct, require_writable

LOADING = "loading the model"


def extract(
    pos: Source | None = None,
    neg: Source | None = None,
    *,
    pairs: Source | None = None,
    model: str | Path | LoadedModel = "smollm2",
    method: str = "diffmean",
    layers: str = "all",
    tokens: str = "completion",
    out: str | Path | None = None,
    seed: int = 0,
    truncate: bool = False,
    match: str | None = None,
    budget_kl: float = QUICK_BUDGET,
    device: str = "auto",
    dtype: str = "auto",
    ray: str | None = None,
    on_event: OnEvent = ignore,
) -> Extraction:
    """Extract a steering vector from two sets of examples, and validate it on held-out folds.

    `pos` and `neg` are files of JSON lines or lists of what their lines hold (texts or objects); `pairs` is one that
    holds both classes. The vector is float32 [hidden] at each of `layers` (such as "all", "12" or "8-15"), scaled so
    that strength 1 is one mean displacement. `match` ("length" or "position") compares only as many tokens, or only the
    positions, as both classes have. `budget_kl` is what the recommended strength may cost on neutral text (nats, 95th
    percentile of the KL divergence per token): layer and strength are calibrated on text that the model writes, in
    seconds; 0 leaves that out. With `out` (a name in .safetensors) it is written there. `model` is a
    folder, a hub id, "smollm2", or what `load_model` gave; `device` and `dtype` are for a model that is loaded here.
    `ray` is the address of a Ray cluster, or "local", over which the examples are spread, with the same numbers.
    `on_event` is called with the progress of each stage, and once with the model and the device that were chosen.

    What is wrong with options and files is refused before a model is looked for; what depends on its configuration and
    tokenizer (layers, lengths, templates) before its weights are loaded; each time in one error with all problems.

    Raises ExampleError, ModelError, UsageError, OutputError (all of them SteerError).
    """
    contrast = read_inputs(
        pos, neg, pairs, method=method, tokens=tokens, layers=layers, device=device, dtype=dtype, budget_kl=budget_kl,
        ray=ray, out=None if out is None else Path(out),
    )  # fmt: skip
    ready = model if isinstance(model, LoadedModel) else open_model(model)
    config = ready.model.config if isinstance(ready, LoadedModel) else ready.config
    planned = plan(contrast, ready.tokenizer, config, layers=layers, which=tokens, truncate=truncate, match=match)
    if not isinstance(ready, LoadedModel):
        on_event(Event(LOADING))
        ready = load(ready, device, dtype)
    on_event(Event(LOADING, message=f"model {ready.source}, on {ready.choice}"))
    with cluster(ray, ready) as on:
        extraction = extract_contrast(
            ready, contrast, method=method, layers=layers, which=tokens, seed=seed, truncate=truncate, match=match,
            budget=budget_kl or None, planned=planned, spread=None if on is None else on.passes, on_event=on_event,
        )  # fmt: skip
    if out is not None:
        extraction.vector.save(out)
    return extraction


def read_inputs(
    pos: Source | None,
    neg: Source | None,
    pairs: Source | None,
    *,
    method: str,
    tokens: str,
    layers: str,
    device: str,
    dtype: str,
    budget_kl: float,
    ray: str | None,
    out: Path | None,
    errors: Sequence[SteerError] = (),
) -> Contrast:
    """The examples of an extraction, whose options are as of `extract`. Raises one error with all problems of both,
    those of `errors` before the others."""
    found = list(errors)
    with collecting(found):
        find_method(method)
    with collecting(found):
        choose(tokens)
    with collecting(found):
        parse_layers(layers)
    require_devices(device, dtype, found)
    with collecting(found):
        contrast = read(pos, neg, pairs)
    with collecting(found):
        if not 0 <= budget_kl < math.inf:
            raise UsageError(
                f"the budget of {budget_kl} nats is negative or not finite", f"use --budget-kl {QUICK_BUDGET}"
            )
    with collecting(found):
        require_cluster(ray)
    if out is not None:
        with collecting(found):
            require_output(out, {"--pos": pos, "--neg": neg, "--pairs": pairs})
    raise_together(found)
    return contrast


def require_output(out: Path, inputs: Mapping[str, object]) -> None:
    """Refuse an output before any work: of another format, unwritable, or an input. Raises UsageError, OutputError."""
    require_writable(out)
    if out.suffix != ".safetensors":
        raise UsageError(
            f"the name {out.name} of the output does not end in .safetensors, which is what is written",
            f"--out {out.with_suffix('.safetensors')}; other formats follow with `steer vectors convert`",
        )
    require_distinct(out, inputs)
