"""An arm of an evaluation as an Inspect log (`inspect view`, `inspect_ai.log.read_eval_log`), one JSON file per arm.

The sample ids of all arms of an evaluation are the same, so that Inspect's data frames pair them. Inspect wants a time;
ours holds none, so that the file is a function of its content: every log says 1970-01-01. Format: version 2 of
inspect_ai's `EvalLog`, read by its release 0.3.285.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vectors.storage.files import digest_json, write_atomically

CREATED = "1970-01-01T00:00:00+00:00"


class Sample(NamedTuple):
    """One item under an arm: what was asked, what shows the behaviour, what was answered, and the scores.

    `output` is None for items that are scored by likelihood alone. A score that is None is missing: the log names it
    with the reason in `missing`.
    """

    id: str
    input: str
    target: str = ""
    output: str | None = None
    scores: Mapping[str, float | None] = {}
    missing: Mapping[str, str] = {}
    group: str = ""


class Metric(NamedTuple):
    """A figure of an arm over its samples, with its interval where it has one."""

    scorer: str
    mean: float | None
    low: float | None = None
    high: float | None = None


def inspect_log(
    suite: str, arm: str, samples: Sequence[Sample], metrics: Sequence[Metric], *, model: str,
    config: Mapping[str, Any], version: str,
) -> dict[str, Any]:  # fmt: skip
    """The log of one arm as JSON values. `config` says what the arm is: its expression, vectors by digest, the seed."""
    identity = digest_json({"suite": suite, "arm": arm, "model": model, "config": dict(config)}).removeprefix("sha256:")
    task = digest_json({"suite": suite}).removeprefix("sha256:")
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": identity[:22],
            "run_id": identity[22:44],
            "created": CREATED,
            "task": suite,
            "task_id": task[:22],
            "task_version": 0,
            "task_args": dict(config),
            "dataset": {"name": suite, "samples": len(samples), "sample_ids": [sample.id for sample in samples]},
            "model": f"steer/{model}",
            "config": {"epochs": 1},
            "packages": {"steer-workbench": version},
            "metadata": {"arm": arm},
        },
        "plan": {"name": arm, "steps": [{"solver": "steer", "params": dict(config)}]},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples),
            "scores": [_result(metric, samples) for metric in metrics if metric.mean is not None],
        },
        "stats": {"started_at": CREATED, "completed_at": CREATED},
        "samples": [_sample(sample, model) for sample in samples],
    }


def write(path: Path, log: Mapping[str, Any]) -> None:
    """Write a log. Raises OutputError."""
    text = json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def file_name(arm: str) -> str:
    """The name of an arm's log: the time of CREATED, its name as far as files can have it, and a part of its digest.

    Inspect lists only files whose names begin with a time, and takes `_` for the end of a part of the name.
    """
    plain = "".join(sign if sign.isascii() and (sign.isalnum() or sign == "-") else "-" for sign in arm)[:60]
    time = CREATED[:19].replace(":", "-")
    return f"{time}_{plain.strip('-') or 'arm'}-{digest_json(arm).removeprefix('sha256:')[:8]}.json"


def _result(metric: Metric, samples: Sequence[Sample]) -> dict[str, Any]:
    scored = sum(sample.scores.get(metric.scorer) is not None for sample in samples)
    values = {"mean": metric.mean, "low": metric.low, "high": metric.high}
    return {
        "name": metric.scorer,
        "scorer": metric.scorer,
        "scored_samples": scored,
        "unscored_samples": sum(metric.scorer in sample.scores for sample in samples) - scored,
        "metrics": {
            name: {"name": name, "value": value}
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        },
    }


def _sample(sample: Sample, model: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": sample.input, "source": "input"}]
    output: dict[str, Any] = {"model": f"steer/{model}", "choices": [], "completion": ""}
    if sample.output is not None:
        answer = {"role": "assistant", "content": sample.output, "source": "generate", "model": f"steer/{model}"}
        messages.append(answer)
        output |= {"choices": [{"message": answer, "stop_reason": "stop"}], "completion": sample.output}
    return {
        "id": sample.id,
        "epoch": 1,
        "input": sample.input,
        "target": sample.target,
        "messages": messages,
        "output": output,
        "scores": {
            name: {"value": value, **({} if sample.output is None else {"answer": sample.output})}
            for name, value in sample.scores.items()
            if value is not None and math.isfinite(value)
        },
        "metadata": {
            **({"group": sample.group} if sample.group else {}),
            **({"missing": dict(sample.missing)} if sample.missing else {}),
        },
    }
