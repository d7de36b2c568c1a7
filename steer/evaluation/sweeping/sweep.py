"""A sweep: points of all candidates on development items, the choice, and what the choice does on the test items."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from probes.arms.equal_divergence import rounded
from probes.models.loading import LoadedModel
from probes.statistics.paired import Difference, difference
from probes.statistics.verdict import too_few_to_say
from steer.cluster import Cluster
from steer.evaluation.suites.items import Item, groups_of, metric_of
from steer.evaluation.sweeping.cells import Cells
from steer.evaluation.sweeping.elsewhere import Elsewhere
from steer.evaluation.sweeping.groups import AUTO, parse_groups, problems_of_groups
from steer.evaluation.sweeping.learning import REPEATS, curve, repeats_of, subset
from steer.evaluation.sweeping.measured import MULTIPLES, Candidate, Items, NeutralText, ids_of, neutral_text
from steer.evaluation.sweeping.request import Settings, Sides, Source, require_possible
from steer.evaluation.sweeping.search import Point, Search, Trial, chosen, golden, safe_strength
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.storage.files import digest_json

__all__ = ["Swept", "subset", "sweep"]
FIRST = 0.05  # of the residual stream's norm: the displacement with which the search for a strength begins
EARLIEST, LATEST = 0.15, 0.85  # of the depth: the layers that `auto` searches
LOWERED = 4  # times that a point whose margin does not rise throughout is weakened
CELLS = 5  # that a candidate takes, about


class Swept(NamedTuple):
    """What a sweep measured: all points, the chosen one with its test figures, and the learning curve, if any.

    A point is chosen only if it is steady: one that raises the margin whichever its sign, or lowers it, steers nothing
    or the other way. `metric` is what is measured of the items: "margin" or "log-odds".
    """

    points: list[Point]
    chosen: Point | None
    test: dict[str, Any]
    learning: list[dict[str, Any]]
    counts: dict[str, int]
    cells: dict[str, int]
    metric: str


def sweep(
    loaded: LoadedModel,
    source: Source,
    sides: Sides,
    settings: Settings,
    *,
    on: Cluster | None = None,
    on_event: OnEvent = ignore,
) -> Swept:
    """Measure the candidates of a source, choose one on the development items, and measure it on the test items.

    Cells that `settings.folder` holds already are not measured again. `on` measures candidates in the processes of a
    cluster, with the same numbers. Raises UsageError for layers without directions,
    ExampleError for items beyond the context.
    """
    groups = require_settings(settings, source.layers, extracts=source.subset is not None)
    neutral = neutral_text(loaded, sides.neutral, seed=settings.seed, on_event=on_event)
    dev, test = Items(loaded, sides.dev), Items(loaded, sides.test)
    context = {
        "model": loaded.identity, "neutral": ids_of(neutral.completions), "dev": ids_of(dev.completions),
        "dtype": str(next(loaded.model.parameters()).dtype), "answers": "counted equally",
    }  # fmt: skip
    cells = Cells(settings.folder, context)
    searched = [layer for layer in source.layers if _inside(layer, loaded)] or source.layers
    count = len(searched) if groups is None and settings.layers.strip() != AUTO else len(groups or range(8))
    expected = CELLS * count * len(source.methods) + (CELLS * REPEATS * len(settings.examples))
    search = Search(cells, neutral, dev, settings.budget, on_event, expected)
    norms = _norms(loaded, neutral)
    is_auto = groups is None and settings.layers.strip() == AUTO
    wanted = [(layer,) for layer in (searched if is_auto else source.layers)] if groups is None else groups

    @functools.cache
    def trial(method: str, index: int) -> Trial:
        candidate = source.candidate(method, wanted[index])
        return Trial(candidate, _first(candidate, norms))

    elsewhere = None
    if on is not None:
        elsewhere = Elsewhere(on, cells, sides.dev, neutral.completions, settings, context)
        by_method = [[trial(method, index) for index in range(len(wanted))] for method in source.methods]
        elsewhere.measure(by_method if is_auto else [[each] for trials in by_method for each in trials], on_event)
    for method in source.methods:

        def point(index: int, method: str = method) -> Point:
            return search.point(trial(method, index), settings.strengths)

        if is_auto:
            golden(len(wanted), point)
        else:
            for index in range(len(wanted)):
                point(index)
    points = list(search.points)
    best = chosen(points)
    figures: dict[str, Any] = {}
    if best is not None and best.opposite:  # as all are, and less of it is no remedy
        best = None
    if best is not None:
        check = neutral_text(loaded, sides.check, seed=settings.seed + 1)

        def cost(strength: float, candidate: Candidate = best.candidate) -> float:
            return max(each.costs([candidate.at(strength)])[0]["p95"] for each in (check, neutral))

        strength, p95 = safe_strength(settings.budget, best.strength, cost)
        if strength != best.strength:
            best = search.at(best.candidate, strength, search.cost(best.candidate, strength))
        best, weaker = _steady(search, best)
        if all(best is not each for each in points):
            points.append(best)
        if best.steady:
            p95 = cost(best.strength) if weaker else p95
            figures = figures_of_test(best, test, sides.test, settings.seed) | {"p95": p95}
        else:
            best = None
    learning: list[dict[str, Any]] = []
    if settings.examples and best is not None and source.subset is not None:
        subset_of, at = source.subset, best

        def few(size: int, repeat: int) -> Trial:
            return Trial(subset_of(at.candidate.method, at.candidate.layers, size, repeat), at.strength)

        sizes = [min(size, source.most) for size in settings.examples]
        if elsewhere is not None:
            each = [
                [few(size, repeat)] for size, repeats in repeats_of(sizes, source.most) for repeat in range(repeats)
            ]
            elsewhere.measure(each, on_event, strengths=())
        learning = curve(sizes, source.most, lambda size, repeat: search.point(few(size, repeat)))
    counts = {"dev": len(sides.dev), "test": len(sides.test), "neutral": len(sides.neutral)}
    measured = {"measured": cells.measured, "reused": cells.reused}
    return Swept(points, best, figures, learning, counts, measured, metric_of(sides.dev[0]))


def require_settings(
    settings: Settings, layers: Sequence[int] | None, *, extracts: bool
) -> list[tuple[int, ...]] | None:
    """The groups of layers of the settings, as of `parse_groups`; `layers` are those that there are directions for,
    None where they are not known yet. Raises UsageError with all problems, so it is called before a model is loaded.
    """
    groups, problems = None, settings.problems()
    try:
        groups = parse_groups(settings.layers)
    except UsageError as error:
        problems += error.problems
    problems += [] if groups is None or layers is None else problems_of_groups(groups, layers)
    if settings.examples and not extracts:
        problems.append("a learning curve needs examples to extract from")
    require_possible(problems, settings.strengths)
    return groups


def _steady(search: Search, point: Point) -> tuple[Point, bool]:
    """The point weakened until the margin rises throughout, and whether it was; where that does not help, the strongest
    steady point, or as it is."""
    weaker = steady = point
    for _ in range(LOWERED):
        if search.throughout(weaker):
            return weaker, weaker is not point
        strength = rounded(0.7 * weaker.strength)
        weaker = search.at(point.candidate, strength, search.cost(point.candidate, strength))
        steady = steady if steady.steady else weaker
    return (steady, steady is not point) if steady.steady else (point, False)


def _inside(layer: int, loaded: LoadedModel) -> bool:
    from probes.models.residual import blocks

    depth = len(blocks(loaded.model))
    return EARLIEST * depth <= layer <= LATEST * depth


def _norms(loaded: LoadedModel, neutral: NeutralText) -> dict[int, float]:
    """The mean norm of the residual stream at each layer, over the tokens of a few neutral texts but the first ones."""
    from probes.logits import logits_of
    from probes.models.residual import blocks, output_of

    norms: dict[int, float] = {}
    handles = []
    for layer, block in enumerate(blocks(loaded.model)):

        def store(_block: Any, _inputs: Any, output: Any, layer: int = layer) -> None:
            norms[layer] = float(output_of(output)[0, 1:].float().norm(dim=-1).mean())

        handles.append(block.register_forward_hook(store))
    try:
        text = max(neutral.completions, key=lambda each: each.length)
        logits_of(loaded.model, text)
    finally:
        for handle in handles:
            handle.remove()
    return norms


def _first(candidate: Candidate, norms: dict[int, float]) -> float:
    """The strength that a search begins with."""
    shares = [float(candidate.directions[layer].norm()) / norms[layer] for layer in candidate.layers if norms[layer]]
    return FIRST / sum(shares) if sum(shares) > 0 else 1.0


def figures_of_test(point: Point, test: Items, items: Sequence[Item], seed: int) -> dict[str, Any]:
    """The figures of the chosen point on the test items, in nats."""
    base, *rows = test.figures([None, *(point.candidate.at(point.strength * multiple) for multiple in MULTIPLES)])
    means = [sum(row) / len(row) for row in [*rows[:2], base, *rows[2:]]]
    steered = rows[MULTIPLES.index(1.0)]
    effect = difference(
        torch.tensor(steered, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64),
        groups_of(items),
        seed=seed,
    )
    return {
        "multiples": [*MULTIPLES[:2], 0.0, *MULTIPLES[2:]],
        "margins": means,
        "steady": all(a < b for a, b in itertools.pairwise(means)),
        "effect": effect.mean, "low": effect.low, "high": effect.high, "groups": effect.clusters,
        "verdict": verdict_of(effect), "too_few": too_few_to_say(effect.items, effect.clusters),
    }  # fmt: skip


def verdict_of(effect: Difference) -> str:
    """What the interval of an effect on test items says, where they are enough."""
    if too_few_to_say(effect.items, effect.clusters):
        return "too few items to say"
    return "moves" if effect.low > 0 else "moves the other way" if effect.high < 0 else "does not move"


def digest_of(config: Any, inputs: Any, metrics: Any) -> str:
    """The digest of a run: of what was asked, read and measured.

    No file has it, since the report and the vector hold it: it is that of `config`, `inputs` and `metrics` of run.json.
    """
    return digest_json([config, inputs, metrics])
