"""Cells of a sweep that processes of a cluster measure, with the numbers that this process would measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from steer.cluster import Cluster
from steer.evaluation.suites.items import Item
from steer.evaluation.sweeping.cells import Cells
from steer.evaluation.sweeping.measured import Items, NeutralText
from steer.evaluation.sweeping.request import Settings
from steer.evaluation.sweeping.search import STAGE, Search, Trial, golden
from vectors.events import Event, OnEvent, ignore

# Key and figures of each cell that a task measured, by the cell's name.
Measured = dict[str, tuple[dict[str, Any], dict[str, Any]]]


class Shared(NamedTuple):
    """What all tasks share: the texts, the settings of the search, and the cells that are known already."""

    context: dict[str, Any]
    neutral: list[Completion]
    dev: list[Item]
    budget: float
    strengths: tuple[float, ...]
    known: dict[str, dict[str, Any]]


class Elsewhere:
    """The cells of one sweep on a cluster; a class because the texts are the same for several calls."""

    def __init__(
        self,
        cluster: Cluster,
        cells: Cells,
        dev: Sequence[Item],
        neutral: Sequence[Completion],
        settings: Settings,
        context: Mapping[str, Any],
    ) -> None:
        self.cluster, self.cells = cluster, cells
        self.shared = Shared(dict(context), list(neutral), list(dev), settings.budget, settings.strengths, {})

    def measure(
        self, tasks: Sequence[list[Trial]], on_event: OnEvent = ignore, *, strengths: tuple[float, ...] | None = None
    ) -> None:
        """Record the cells of each task: of one trial, or of a golden-section search over several.

        Cells are recorded as tasks are finished. `strengths` replaces those of the settings.
        """
        shared = self.shared._replace(known=self.cells.recorded())
        if strengths is not None:
            shared = shared._replace(strengths=strengths)
        for done, (_, cells) in enumerate(self.cluster.map(measured, shared, tasks)):
            self.cells.take(cells)
            on_event(Event(f"{STAGE} on the cluster", done + 1, len(tasks), "candidates"))


_SEARCHES: dict[str, Search] = {}  # in a process of the cluster: the search of the latest sweep, for its streams


def measured(loaded: LoadedModel, shared: Shared, trials: list[Trial]) -> Measured:
    """The cells of a task, in a process of the cluster."""
    cells = Cells(None, shared.context)
    cells.known.update(shared.known)
    latest = _SEARCHES.get(cells.context)
    if latest is None:
        _SEARCHES.clear()
        neutral, items = NeutralText(loaded, shared.neutral), Items(loaded, shared.dev)
    else:
        neutral, items = latest.neutral, latest.items
    search = _SEARCHES[cells.context] = Search(cells, neutral, items, shared.budget, ignore, 1)
    if len(trials) == 1:
        search.point(trials[0], shared.strengths)
    else:
        golden(len(trials), lambda index: search.point(trials[index], shared.strengths))
    return {name: (key, cells.known[name]) for name, key in cells.fresh.items()}
