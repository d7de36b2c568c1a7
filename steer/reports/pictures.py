"""Pictures as SVG: the same figures give the same bytes. Needs the extra `plots`."""

from __future__ import annotations

import io
from typing import Any

MISSING = "<p class='note'>pictures need the extra <code>plots</code></p>"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure in inches; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Any) -> str:
    """A figure as SVG, without a date and random ids."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "steer"}):
        drawn.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def inline(picture: str | None) -> str:
    """A picture as part of a page: without the XML declaration; a note where there is none."""
    return picture[picture.index("<svg") :] if picture else MISSING
