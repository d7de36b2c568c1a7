"""Write the tables of docs/merge.md, of what is merged and what is refused, from the tests that show it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the tables between their marks in docs/merge.md."""
    sys.path[:0] = [str(ROOT / part) for part in (".", "tests", "tests/merges", "tests/merges/inputs")]
    import support

    document = ROOT / "docs" / "merge.md"
    document.write_text(support.with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
