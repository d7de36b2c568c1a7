"""`steer ab stop`: send new conversations to the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named):
    """The arguments and options of `steer ab stop`."""

    reason: str = option("by hand", help="Why, as steer ab status shows it.")


@options.command(
    "stop",
    summary="Stop an experiment: new conversations get the control, on every server within a second.",
    examples="""
    steer ab stop tone
    steer ab stop tone --reason "users complain"
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Stop an experiment: new conversations get the control, on every server within a second.

    Conversations that have begun keep their arm. A stop is for good, and of all versions that have been served: servers
    of one log may run different ones. A file that is edited afterwards begins a new version.
    """
    from steer.experiments.overview import version_in
    from steer.experiments.storage import state

    request = requests.build(Request, values)
    with _log.opened(request.experiment) as log:
        name = log.address.name
        version = version_in(log.engine, name)
        versions = state.stop(log.engine, name, request.reason[:1000])
        reason = state.state_of(log.engine, name, version).stopped
    data = {"experiment": name, "version": version, "stopped": reason, "before": not versions, "versions": versions}
    if not versions:
        said = f"{name}, version {version}, was stopped already: {reason}"
    else:
        said = f"stopped: {name}, version {' and '.join(map(str, versions))}"
    out.result(data, lambda: out.line(said))
