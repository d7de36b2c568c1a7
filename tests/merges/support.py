"""What merging takes and what it refuses, as rows of the table in docs/merge.md: each is shown by a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from tables import between_marks

Test = TypeVar("Test", bound=Callable[..., Any])
MODULES = ("test_against_peft", "test_locations", "test_names_and_layers", "test_checkpoints")
_SHOWN: dict[tuple[str, str], tuple[str, str]] = {}  # by part and what: the outcome, and the test


def shows(part: str, what: str, outcome: str) -> Callable[[Test], Test]:
    """Mark a test as the one that shows what happens to `what`; `part` is the table, adapters or checkpoints."""

    def mark(test: Test) -> Test:
        _SHOWN[part, what] = outcome, f"{test.__module__}::{test.__name__}"
        return test

    return mark


def tables() -> str:
    """The tables of adapters and of checkpoints, from the tests' own lists and marks."""
    against_peft, *_ = map(importlib.import_module, MODULES)
    settings = against_peft.settings
    types = sorted(kind.value for kind in against_peft.peft.PeftType)
    merged, refused = ([what for what, *_ in rows] for rows in (against_peft.MERGED_BY_BOTH, against_peft.REFUSED))
    others = [f"`{kind}`" for kind in types if kind not in settings.APPLIED_TYPES]
    adapters = [
        ("LoRA: " + "; ".join(merged), "applied", "test_lora_gives_what_peft_gives"),
        ("LoRA: initialisation EVA", "applied", "test_an_adapter_initialised_by_eva_gives_what_peft_gives"),
        (
            "types " + ", ".join(f"`{kind}`" for kind in settings.APPLIED_TYPES[1:]), "applied",
            "test_other_types_give_what_peft_gives",
        ),
        ("LoRA: " + "; ".join(refused), "refused", "test_lora_that_is_no_plain_delta_is_refused_by_name"),
        (
            "LoRA initialised by " + ", ".join(settings.OF_BASE.values()), "refused",
            "test_every_initialisation_that_changes_the_base_is_named",
        ),
        (
            "LoRA with " + "; ".join(f"`{field}` ({reason})" for field, reason in settings.REFUSED.items()), "refused",
            "test_every_refused_field_is_named_with_its_reason",
        ),
        ("types " + ", ".join(others), "refused", "test_every_type_of_peft_is_applied_or_refused_by_its_name"),
    ]  # fmt: skip
    rows = [(what, outcome, f"test_against_peft::{test}") for what, outcome, test in adapters]
    # In the order of the modules, whichever was imported first; within one, as they are written.
    marks = sorted(_SHOWN.items(), key=lambda item: MODULES.index(item[1][1].partition("::")[0]))
    shown = {part: [(what, *rest) for (p, what), rest in marks if p == part] for part in ("adapters", "checkpoints")}
    return "\n".join([_table("adapter", rows + shown["adapters"]), "", _table("checkpoint", shown["checkpoints"])])


def _table(head: str, rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {head} | what happens | shown by |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {outcome} | `{test}` |" for what, outcome, test in rows])


def with_tables(text: str) -> str:
    """A document with the tables between the marks as they should be. Raises ValueError for one without marks."""
    return between_marks(text, tables())
