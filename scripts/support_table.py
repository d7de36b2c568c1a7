"""Write the tables of docs/merge.md, docs/extract.md and docs/serve.md, of what is taken and what is refused, from
their tests.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the tables between their marks in both documents."""
    folders = (".", "tests", "tests/merges", "tests/merges/inputs", "tests/probes/data", "tests/steer")
    sys.path[:0] = [str(ROOT / part) for part in folders]
    import architecture_rows
    import forms
    import support

    document = ROOT / "docs" / "merge.md"
    document.write_text(support.with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
    document = ROOT / "docs" / "extract.md"
    with tempfile.TemporaryDirectory() as folder:
        document.write_text(forms.with_table(document.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
    document = ROOT / "docs" / "serve.md"
    with tempfile.TemporaryDirectory() as folder:
        text = architecture_rows.with_table(document.read_text(encoding="utf-8"), Path(folder))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
