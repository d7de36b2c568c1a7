"""The table of what is merged and what is refused says what the tests show."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import support

DOCUMENT = Path(__file__).parents[3] / "docs" / "merge.md"


def test_the_table_in_the_docs_is_what_the_tests_show() -> None:
    pytest.importorskip("peft")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == support.with_tables(text), "run scripts/support_table.py"


def test_every_row_names_a_test_that_exists() -> None:
    pytest.importorskip("peft")
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", support.tables()))
    assert named
    for module, test in named:
        assert hasattr(importlib.import_module(module), test), f"{module}::{test}"
