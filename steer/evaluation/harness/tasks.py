"""Running tasks of lm-evaluation-harness on every arm, so that arms can be compared in pairs, sample by sample."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partialmethod
from typing import Any, NamedTuple

from probes.models.loading import LoadedModel
from steer.evaluation.arms.arm import Arm
from steer.evaluation.harness.language_model import language_model
from steer.evaluation.measuring.figures import intervention
from vectors.errors import SteerError, UsageError, guess
from vectors.events import Event, OnEvent, ignore

INSTALL = "pip install 'steer-workbench[eval]'"


class TaskFigure(NamedTuple):
    """One metric of a task under one arm, as the harness gives it.

    `samples` are the values of the single documents by their number; empty for metrics that are none of documents, such
    as a word perplexity of the whole task. `higher_is_better` is None where the task does not say.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool | None
    samples: Mapping[int, float]


def require_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that the harness does not know. Raises UsageError with all of them; nothing is downloaded."""
    manager = _manager()
    names = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in names and not os.path.isfile(task)]
    if unknown:
        raise UsageError(
            [f"lm-evaluation-harness has no task {task!r}{guess(task, names)}" for task in unknown],
            "give the name of a task, of a group, or the path of a task's YAML file",
        )


def measure_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    arms: Sequence[Arm],
    *,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
    any_base: bool = False,
    on_event: OnEvent = ignore,
) -> list[list[TaskFigure]]:
    """The figures of the tasks under each arm; `loaded` is the model of all these arms.

    `limit` takes only the first documents of each task; `chat` puts requests into the chat template. An arm's system
    prompt is the harness's `system_instruction`. Tasks are code and data of the harness and of whoever wrote their
    files; a task that executes what a model writes is refused by the harness. Raises UsageError, and SteerError for a
    task whose data is not there.
    """
    require_tasks(tasks)
    from lm_eval import simple_evaluate

    manager = _manager()
    figures = []
    for position, arm in enumerate(arms):
        on_event(Event("running tasks", position, len(arms), "arms"))
        lm = language_model(loaded, intervention(loaded, arm, any_base), name=str(loaded.source), seed=seed)
        try:
            with _without_bars():
                results = simple_evaluate(
                    model=lm, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=True,
                    bootstrap_iters=1000, system_instruction=arm.system, apply_chat_template=chat, random_seed=seed,
                    numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, verbosity="ERROR",
                )  # fmt: skip
        except SteerError:
            raise
        except Exception as error:  # a task is code and data of others
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise SteerError(
                f"lm-evaluation-harness can't run {', '.join(tasks)}: {type(error).__name__}: {reason}",
                "run it with `lm_eval --model hf` to see whether the task's data is there",
            ) from error
        figures.append(_figures(results))
    on_event(Event("running tasks", len(arms), len(arms), "arms"))
    return figures


@cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to make. Raises UsageError where it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-evaluation-harness, which is not installed: {error}", INSTALL) from error
    return TaskManager()


def _figures(results: Mapping[str, Any]) -> list[TaskFigure]:
    """The metrics of all tasks in the harness's result, which names them `METRIC,FILTER`."""
    figures = []
    for task, values in sorted(results["results"].items()):
        directions = results.get("higher_is_better", {}).get(task, {})
        for name, value in values.items():
            metric, comma, chosen = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            samples = {
                int(sample["doc_id"]): float(sample[metric])
                for sample in results.get("samples", {}).get(task, ())
                if sample.get("filter") == chosen and isinstance(sample.get(metric), int | float)
            }
            figures.append(
                TaskFigure(
                    task,
                    metric if chosen == "none" else f"{metric} ({chosen})",
                    float(value),
                    float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    directions.get(metric),
                    samples,
                )
            )
    return figures


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """A context without tqdm's progress bars, since ours say how far the arms are; it restores the environment."""
    std: Any = importlib.import_module("tqdm.std")
    original, before = std.tqdm.__init__, dict(os.environ)
    std.tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        std.tqdm.__init__ = original
        for name in set(os.environ) - set(before):  # the harness sets some
            del os.environ[name]
        os.environ.update(before)
