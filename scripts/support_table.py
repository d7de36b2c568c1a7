"""Write the tables of docs/merge.md, docs/extract.md and docs/serve.md, of what is taken and what is refused, from
their tests. With --serving, only the column of serving is written again, from what was recorded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the tables between their marks in the documents."""
    folders = (".", "tests", "tests/merges", "tests/merges/inputs", "tests/probes/data", "tests/steer")
    sys.path[:0] = [str(ROOT / part) for part in folders]
    import architecture_rows
    import forms
    import support

    serving = ROOT / "docs" / "serve.md"
    text = serving.read_text(encoding="utf-8")
    if "--serving" in sys.argv:
        serving.write_text(architecture_rows.with_serving(text), encoding="utf-8")
        return
    document = ROOT / "docs" / "merge.md"
    document.write_text(support.with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
    document = ROOT / "docs" / "extract.md"
    with tempfile.TemporaryDirectory() as folder:
        document.write_text(forms.with_table(document.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        serving.write_text(architecture_rows.with_table(text, Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
