"""What became of a request, by the status that the log has of it.

Only failures of the server speak against an arm. A request that is refused (bad parameters, a prompt that is too long)
would have been refused in any arm, and one client that sends it again and again sends it to one arm. It is counted by
itself, as is a client that has gone away.
"""

from __future__ import annotations

GONE, FAILED = 499, 500
FIRST_ERROR = 400  # answers have a status below


def failed(status: int) -> bool:
    """Whether the server has failed."""
    return status >= FAILED


def refused(status: int) -> bool:
    """Whether the request was refused, for what the client has sent."""
    return FIRST_ERROR <= status < FAILED and status != GONE
