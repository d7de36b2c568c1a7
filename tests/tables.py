"""Tables in the documentation that scripts/support_table.py writes, between two marks."""

from __future__ import annotations

BEGIN, END = "<!-- begin: written by scripts/support_table.py -->", "<!-- end -->"


def between_marks(document: str, tables: str) -> str:
    """A document with these tables between its marks. Raises ValueError for one without marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the tables, between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
