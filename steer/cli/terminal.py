"""What may reach a terminal: text without control sequences, errors of bounded length."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST, MOST = 2000, 40  # characters of one problem, problems of one error
# C0 and C1 controls but for tab and newline, and what changes the direction of writing: a file's name or its metadata
# could move the cursor, hide text, or set the title of a window.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text with every control character as a visible escape."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def clean_json(text: str) -> str:
    """JSON with every control character escaped, which JSON's own escapes of C0 leave out."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def bounded(problems: Sequence[str]) -> list[str]:
    """Problems of which none is longer than `LONGEST`, and not more than `MOST`; what was left out is counted."""
    found = [p if len(p) <= LONGEST else f"{p[:LONGEST]} … ({len(p) - LONGEST} more characters)" for p in problems]
    return found if len(found) <= MOST else [*found[:MOST], f"and {len(found) - MOST} more problems"]
