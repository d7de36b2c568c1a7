"""`steer ab forget`: remove a person's rows from the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.cli import options, requests
from steer.cli.commands.ab import _log
from steer.cli.output import out
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.experiments.document import Address


@dataclass(frozen=True, kw_only=True)
class Request(_log.Named):
    """The arguments and options of `steer ab forget`."""

    unit: str = option(
        help="The unit as clients send it: a user, a header's value, a conversation's id.", argument=True
    )


@options.command(
    "forget",
    summary="Remove the rows of a unit from the log: answers, texts and feedback.",
    examples="""
    steer ab forget tone ann@example.com
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Remove the rows of a unit from the log: answers, texts and feedback.

    The log holds salted hashes; the salt in the experiment's file finds those of the unit. Rows that a server has not
    written yet never arrive. Backups are not touched.
    """
    from steer.experiments.exports import forget

    request = requests.build(Request, values)
    with _log.opened(request.experiment) as log:
        removed = forget(log.engine, log.address.name, log.address.salt, request.unit)
    if not removed.answers and not removed.feedback:
        out.warn(f"the log holds nothing of {request.unit!r}: {_next_step(log.address)}")
    data = {"experiment": log.address.name, "answers": removed.answers, "feedback": removed.feedback}
    out.result(data, lambda: out.line(f"removed {removed.answers} answers and {removed.feedback} rows of feedback"))


def _next_step(address: Address) -> str:
    """What to do where the log of an experiment holds no rows of a unit."""
    if address.unit == "conversation":
        return (
            f"the unit of {address.name} is the conversation, so its log does not hold users: give the id that the "
            "client sends as X-Steer-Conversation, or let `unit: user` make users the units"
        )
    sent = "in the field `user`" if address.unit == "user" else f"in the header {address.unit['header']}"
    return f"give the id, letter by letter, that the client sends {sent}, and the file with the salt of that time"
