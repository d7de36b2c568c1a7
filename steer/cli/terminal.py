"""Makes text safe for a terminal: no control sequences."""

from __future__ import annotations

import re

# C0 and C1 controls except tab and newline, marks of writing direction, and lone surrogates: in a file's name or its
# metadata they could move the cursor, hide text, or set the title of a window.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text with every control character as a visible escape sequence."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def clean_json(text: str) -> str:
    """JSON text with the control characters escaped that json.dumps leaves as they are."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
