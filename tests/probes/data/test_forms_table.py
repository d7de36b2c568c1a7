"""The table of example files in docs/extract.md is what reading them gives."""

from __future__ import annotations

from pathlib import Path

import forms
import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "extract.md"
REFUSED = {
    *("the same, labels of other names", "an object that no form has", "a Parquet file", "a line that is cut"),
    "an empty file",
}


def test_the_table_in_the_documentation_is_what_reading_gives(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert forms.with_table(text, tmp_path) == text, "run scripts/support_table.py"


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.what)
def test_a_form_is_read_in_one_way_or_refused_with_its_file_in_both(form: forms.Form, tmp_path: Path) -> None:
    outcomes = [forms.outcome(form, tmp_path, pairs=pairs) for pairs in (False, True)]
    refused = [outcome for outcome in outcomes if outcome.startswith("refused: ")]
    assert all(form.file in outcome for outcome in refused)
    assert len(refused) == (2 if form.what in REFUSED else 1)
