"""`steer.sweep`: where, how strongly and by which method a behaviour is steered best within a budget, as a function."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probes.arms import BUDGET
from probes.data.reading import Contrast
from probes.directions.extraction import extract
from probes.directions.methods import method as find_method
from probes.directions.plan import Plan, plan
from probes.directions.pooled import pooled_examples
from probes.models.loading import LoadedModel, OpenedModel, load, open_model
from probes.models.packed_linear import packed_linear
from steer.cluster import cluster, require_cluster
from steer.evaluation.suites.reading import Sources
from steer.evaluation.sweeping import record
from steer.evaluation.sweeping.inputs import Inputs, read_inputs
from steer.evaluation.sweeping.measured import Candidate
from steer.evaluation.sweeping.parts import parts_of
from steer.evaluation.sweeping.record import Result
from steer.evaluation.sweeping.request import Settings, Source, sides_of
from steer.evaluation.sweeping.sweep import require_settings, subset
from steer.evaluation.sweeping.sweep import sweep as run
from vectors import fit, references
from vectors.errors import SteerError, collecting
from vectors.events import Event, OnEvent, ignore
from vectors.registry.layers import spans
from vectors.registry.options import several
from vectors.steering import SteeringVector
from vectors.storage.files import digest_json, require_writable


def sweep(
    vector: str | Path | SteeringVector,
    *,
    pos: str | Path | None = None,
    neg: str | Path | None = None,
    pairs: str | Path | None = None,
    choices: str | Path | None = None,
    suite: str | Path | None = None,
    neutral: str | Path | None = None,
    layers: str = "auto",
    strengths: float | Sequence[float] = (),
    methods: str | Sequence[str] = (),
    examples: int | Sequence[int] = (),
    budget_kl: float = BUDGET,
    out: str | Path | None = None,
    report: str | Path | None = None,
    model: str | Path | LoadedModel | None = None,
    allow_overlap: bool = False,
    any_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    ray: str | None = None,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> Result:
    """Find the layer, strength and method that steer most within a budget: what `steer sweep` does.

    Items come from `suite`, from files of examples as `steer.extract` takes, or from `choices` (as `steer.evaluate`
    takes). `layers` is "auto", "all" or a list
    such as "8-20,10+14,8..12"; `strengths` a grid, else each candidate is tried at the greatest strength whose KL on
    neutral text (nats, 95th percentile per token) is within `budget_kl`. `methods` are extraction methods to compare:
    directions that are extracted from a part of the files replace the vector's. `examples` are the sizes of a learning
    curve, which changes nothing else. The vector of the result
    holds the recommendation, and is written to `out`; where nothing is recommended, the vector is as it was, nothing is
    written, and the report says why (`nothing_recommended`). `report` is a folder for the report and for what was
    measured, from which an ended sweep goes on. `ray` is the address of a Ray cluster, or "local".
    Raises SteerError with all problems before a model is loaded.
    """
    errors: list[SteerError] = []
    if out is not None:
        with collecting(errors):
            require_writable(Path(out))
    with collecting(errors):
        require_cluster(ray)
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    settings = Settings(
        layers=layers, budget=budget_kl, seed=seed, any_base=any_base, folder=None if report is None else Path(report),
        **several(Settings, {"strengths": strengths, "examples": examples}),
    )  # fmt: skip
    paths = [None if each is None else Path(each) for each in (suite, pos, neg, pairs, choices, neutral)]
    sources = Sources(
        suite=paths[0], pos=paths[1], neg=paths[2], pairs=paths[3], choices=paths[4], neutral=paths[5]
    )  # fmt: skip
    read = read_inputs(
        vector, sources, settings, methods=methods, allow_overlap=allow_overlap, own_model=model is None, errors=errors
    )
    result = _sweep_read(
        read, settings, model=model, methods=methods, device=device, dtype=dtype, ray=ray, on_event=on_event
    )
    if out is not None and result.swept.chosen is not None:
        result.vector.save(out)
    return result


def _sweep_read(
    read: Inputs,
    settings: Settings,
    *,
    model: str | Path | LoadedModel | None = None,
    methods: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    ray: str | None = None,
    on_event: OnEvent = ignore,
) -> Result:
    """Sweep the layers and strengths of a vector over the items of a suite, and recommend the best point in it.

    A learning curve extracts from pairs of the test's side, as the vector was extracted, and is measured on the items
    for development; it chooses nothing. With `methods` the examples are split three ways by content, and directions
    extracted from the first part, with the vector's tokens and match, take the place of the vector's.
    `ray` is the address of a Ray cluster, or "local", over which candidates are spread, with the same numbers.
    Raises SteerError with all problems before a model is loaded.
    """
    loaded_vector, suite = read.vector, read.suite
    method = loaded_vector.metadata.get("method", {})
    name, parameters = method.get("name"), method.get("parameters") or {}
    as_before: dict[str, Any] = {
        "truncate": bool(parameters.get("truncate")), "match": parameters.get("match"),
    }  # fmt: skip
    tokens, extracted_by = str(parameters.get("tokens", "completion")), str(name or "diffmean")
    if suite is None:
        assert read.examples is not None
        return sweep_examples(
            read.examples, settings, model=model or _model_of(loaded_vector), methods=methods, tokens=tokens,
            neutral=read.neutral, device=device, dtype=dtype, ray=ray, on_event=on_event, **as_before,
        )  # fmt: skip
    curve_from = read.examples
    for note in suite.notes:
        on_event(Event("reading the suite", message=note))
    sides = read.sides
    assert sides is not None
    opened = model if isinstance(model, LoadedModel) else open_model(model or _model_of(loaded_vector))
    config = opened.model.config if isinstance(opened, LoadedModel) else opened.config
    fit.require_fit(
        [(read.called, loaded_vector)], hidden_size=int(config.get_text_config().hidden_size),
        layers=int(config.get_text_config().num_hidden_layers),
        base=references.identified(opened.source, opened.identity), any_base=settings.any_base,
    )  # fmt: skip
    planned: Plan | None = None
    if curve_from is not None:
        planned = plan(
            curve_from, opened.tokenizer, config, layers=spans(loaded_vector.layers), which=tokens, **as_before
        )
    ready = _loaded(opened, device, dtype, on_event)
    source = Source(
        [str(name or "vector")], sorted(loaded_vector.layers),
        lambda method, layers: Candidate(method, layers, {i: loaded_vector.layers[i] for i in layers}),
        {"vector": loaded_vector.digest, "data": dict(suite.digests), "overlap": read.overlap},
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        on = stack.enter_context(cluster(ray, ready))
        if curve_from is not None and planned is not None:
            spread = None if on is None else on.passes
            pooled = stack.enter_context(pooled_examples(ready, curve_from, planned, spread=spread, on_event=on_event))
            count, paired = len(curve_from.positive), curve_from.paired

            def few(_method: str, layers: tuple[int, ...], size: int, repeat: int) -> Candidate:
                numbers = subset(size, count, count, paired, settings.seed, repeat)
                directions = {i: pooled.direction(extracted_by, i, numbers) for i in layers}
                return Candidate(extracted_by, layers, directions)

            source = source._replace(subset=few, most=count)
        stack.enter_context(packed_linear(ready.model))  # packed once for all cells
        swept = run(ready, source, sides, settings, on=on, on_event=on_event)
    return record.result(
        swept, loaded_vector, source, settings, ready, record.record_of(sides.dev, suite.of("test"))
    )  # fmt: skip


def sweep_examples(
    contrast: Contrast,
    settings: Settings,
    *,
    model: str | Path | LoadedModel = "smollm2",
    methods: Sequence[str] = ("diffmean",),
    tokens: str = "completion",
    match: str | None = None,
    truncate: bool = False,
    neutral: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    ray: str | None = None,
    on_event: OnEvent = ignore,
) -> Result:
    """Extract by each method from one part of the examples, choose on a second, and test on a third.

    The vector of the result holds the chosen method's directions. `ray` is as of `sweep`. Raises SteerError.
    """
    require_cluster(ray)
    for name in methods:
        find_method(name)
    parts = parts_of(contrast, settings.seed)
    ready = model if isinstance(model, LoadedModel) else None
    opened = open_model(model) if not isinstance(model, LoadedModel) else None
    config = opened.config if opened is not None else model.model.config  # type: ignore[union-attr]
    tokenizer = opened.tokenizer if opened is not None else model.tokenizer  # type: ignore[union-attr]
    planned = plan(parts.extraction, tokenizer, config, which=tokens, truncate=truncate, match=match)
    require_settings(settings, planned.layers, extracts=True)
    if ready is None:
        on_event(Event("loading the model"))
        ready = load(opened, device, dtype)  # type: ignore[arg-type]
    sides = sides_of(parts.dev, parts.test, neutral)
    with (
        cluster(ray, ready) as on,
        pooled_examples(
            ready, parts.extraction, planned, spread=None if on is None else on.passes, on_event=on_event
        ) as examples,
        packed_linear(ready.model),
    ):

        def candidate(method: str, layers: tuple[int, ...], chosen: Sequence[int] | None = None) -> Candidate:
            return Candidate(method, layers, {i: examples.direction(method, i, chosen) for i in layers})

        positives, negatives = len(parts.extraction.positive), len(parts.extraction.negative)

        def few(method: str, layers: tuple[int, ...], size: int, repeat: int) -> Candidate:
            numbers = subset(size, positives, negatives, contrast.paired, settings.seed, repeat)
            return candidate(method, layers, numbers)

        inputs = {"data": dict(contrast.digests)} | ({"neutral": digest_json(list(neutral))} if neutral else {})
        source = Source(list(methods), planned.layers, candidate, inputs, few, min(positives, negatives))
        swept = run(ready, source, sides, settings, on=on, on_event=on_event)
    chosen = swept.chosen.candidate.method if swept.chosen is not None else methods[0]
    extraction = extract(
        ready, parts.extraction, method=chosen, which=tokens, seed=settings.seed, truncate=truncate, match=match,
        planned=planned, on_event=on_event,
    )  # fmt: skip
    vector = extraction.vector
    if swept.chosen is None:
        vector = record.doubted(vector, swept, settings.budget)
    return record.result(
        swept, vector, source, settings, ready, record.record_of(parts.dev, parts.test)
    )  # fmt: skip


def _model_of(vector: SteeringVector) -> str:
    return str(vector.base.get("name") or "smollm2")


def _loaded(model: OpenedModel | LoadedModel, device: str, dtype: str, on_event: OnEvent) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    on_event(Event("loading the model"))
    return load(model, device, dtype)
