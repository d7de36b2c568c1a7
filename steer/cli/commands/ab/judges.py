"""`steer ab judges`: how far the judges of an experiment agree with people."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named):
    """The arguments and options of `steer ab judges`."""

    labels: Path = option(
        help='Texts with hand labels, one JSON object a line: {"prompt", "response", "label"}; 0, 1, 2, yes or no.'
    )
    model: str | None = option(
        None, help="The model that judges which are probes read.", complete="models",
        default_text="that of the experiment, or of its vectors",
    )  # fmt: skip
    device: str = option("auto", help="The device to compute on: auto, cpu, cuda, cuda:N or mps.")
    seed: int = option(0, help="The random seed of the intervals.")


@options.command(
    "judges",
    summary="Measure how far the judges of an experiment agree with hand labels.",
    examples="""
    steer ab judges tone --labels labels.jsonl
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Measure how far the judges of an experiment agree with hand labels.

    Every judge scores the texts as on live traffic. Of a metric that is yes or no there is Cohen's kappa, of a number
    the AUROC, each with a 95 % interval. The log keeps the result, and the report shows it; without, it says that the
    judge has not been validated.
    """
    from steer.evaluation.judging.agreement import read_labels
    from steer.evaluation.scorers import Resources
    from steer.experiments import document
    from steer.experiments.paired.inputs import base_of
    from steer.experiments.running.questions import require_keys
    from steer.experiments.running.validation import validate
    from steer.experiments.storage import state
    from steer.experiments.storage.database import write
    from vectors.errors import SteerError, UsageError, collecting, raise_together

    request = requests.build(Request, values)
    errors: list[SteerError] = []
    experiment, labels = None, None
    with collecting(errors):
        experiment = document.read(document.find(request.experiment), model=request.model)
        if not experiment.judges:
            raise UsageError(f"the experiment {experiment.name} has no judges", "docs/ab.md says how to write one")
        require_keys(experiment)
    with collecting(errors):
        labels = read_labels(request.labels)
    raise_together(errors)
    assert experiment is not None
    assert labels is not None
    with out.progress() as on_event:
        loaded = None
        if experiment.readouts:
            from probes.models.loading import load

            loaded = load(request.model or experiment.model or base_of(experiment), request.device)
        resources = Resources(loaded=loaded, device=request.device, seed=request.seed, on_event=on_event)
        found = validate(experiment, labels, resources, request.seed)
    version = None
    with contextlib.suppress(_log.NotServed), _log.opened(request.experiment) as log:
        version = state.version_of(log.engine, experiment.name, experiment.digest)
        if version is not None:
            events = [state.event(experiment.name, version, state.VALIDATED, reason=each.sentence()) for each in found]
            write(log.engine, [("events", event) for event in events])
    if version is None:
        out.warn("the file as it is has not been served, so no log keeps this; run it again then, for the report")
    data = {"experiment": experiment.name, "version": version, "labels": labels.digest,
            "judges": [each._asdict() for each in found]}  # fmt: skip
    out.result(data, lambda: out.line("\n".join(each.sentence() for each in found)))
