"""Work on the processes of a Ray cluster, each of which loads the model once (extra `scale`).

A task that was lost with its process is run again. The number of threads is the caller's in every process, so that sums
are taken in the same order and results are the same to the bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from probes.capture.activations import Elsewhere, Pass, passes_of
from probes.models.loading import LoadedModel
from probes.models.tokens import Tokens
from vectors.errors import ModelError, SteerError, UsageError

LOCAL = "local"
PARTS = 4  # of an extraction for each core, so that all end at about the same time
RETRIES = 20  # of a task whose process was lost

# From the model and what all tasks share to the value of a task; a function of a module, by name.
Work = Callable[[LoadedModel, Any, Any], Any]


class ModelPlace(NamedTuple):
    """Where a process finds the model: its folder or hub id, its digest, device and dtype; and how many threads."""

    reference: str
    digest: str
    device: str
    dtype: str
    threads: int


def require_cluster(address: str | None) -> None:
    """Refuse an address that can't be used, before anything is started. Raises UsageError."""
    if address is None:
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray, which is not installed", "pip install 'steer-workbench[scale]'")
    if not address.strip():
        raise UsageError("--ray is empty", "give the address of a cluster, or local")


class Cluster:
    """A connection to a cluster, for one model."""

    def __init__(self, ray: Any, place: ModelPlace) -> None:
        self.ray, self.place = ray, place
        self.tasks = ray.remote(num_cpus=1, max_retries=RETRIES)(process_task)

    @property
    def size(self) -> int:
        """The number of cores."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    def passes(self, examples: Sequence[Tokens], layers: Sequence[int]) -> Elsewhere:
        """Where the passes over these examples run: a `probes.capture.activations.Spread`."""

        def run(count: int) -> Iterator[tuple[int, Pass]]:
            size = math.ceil(count / (PARTS * self.size))
            shards = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
            for _, found in self.map(_shard, (list(examples), list(layers)), shards):
                yield from found

        return run

    def map(self, work: Work, shared: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """The number and the value of each task, as they are finished. Raises the first SteerError of a task."""
        common = self.ray.put(shared)
        waiting = {self.tasks.remote(self.place, work, common, task): i for i, task in enumerate(tasks)}
        try:
            while waiting:
                (finished, *_), _ = self.ray.wait(list(waiting))
                number = waiting.pop(finished)
                try:
                    value = self.ray.get(finished)
                except self.ray.exceptions.RayError as error:
                    raise ModelError(
                        f"a process of the Ray cluster failed: {str(error).strip().splitlines()[-1]}",
                        "run without --ray, which shows the error where it occurs",
                    ) from error
                if isinstance(value, SteerError):
                    raise value
                yield number, value
        finally:
            for task in waiting:
                self.ray.cancel(task, force=True)


@contextlib.contextmanager
def cluster(address: str | None, loaded: LoadedModel) -> Iterator[Cluster | None]:
    """A context with a cluster for a model: of this machine's cores for `local`, which ends with it; None without.

    Raises UsageError where there is no cluster at the address.
    """
    if address is None:
        yield None
        return
    import ray
    import torch

    local = address == LOCAL
    with _without_noise():
        try:
            ray.init(
                address=None if local else address, num_cpus=os.cpu_count() if local else None,
                include_dashboard=False if local else None, log_to_driver=False, logging_level=logging.ERROR,
                configure_logging=False,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"no Ray cluster at {address}: {reason}", "start one with `ray start --head`, or --ray local"
            ) from error
        try:
            parameter = next(loaded.model.parameters())
            yield Cluster(ray, ModelPlace(
                str(loaded.source.path), str(loaded.identity["digest"]), str(parameter.device.type),
                str(parameter.dtype).removeprefix("torch."), torch.get_num_threads(),
            ))  # fmt: skip
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Ray without its usage statistics and its advice, which it takes from the environment."""
    before = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _shard(loaded: LoadedModel, shared: tuple[list[Tokens], list[int]], numbers: list[int]) -> list[tuple[int, Pass]]:
    """The passes of these numbers, in a process of the cluster."""
    return passes_of(loaded.model, *shared, numbers)


_LOADED: dict[ModelPlace, LoadedModel] = {}  # in a process of the cluster


def process_task(place: ModelPlace, work: Work, shared: Any, task: Any) -> Any:
    """A task in a process of the cluster: its value, or the SteerError that it raised."""
    import torch

    from probes.models.loading import load

    torch.set_num_threads(place.threads)
    try:
        if place not in _LOADED:
            _LOADED.clear()
            loaded = load(place.reference, place.device, place.dtype)
            if loaded.identity["digest"] != place.digest:
                raise ModelError(
                    f"the model {place.reference} is another one on a process of the Ray cluster",
                    "put the same model there, or name it by its hub id and revision",
                )
            _LOADED[place] = loaded
        return work(_LOADED[place], shared, task)
    except SteerError as error:
        return error
