"""A method is one MergeMethod, built in or from an installed package, and what is none is refused by name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from merges import methods
from merges.engine.method import MergeMethod
from vectors.errors import UsageError


def combine(_task: Any, block: Any, _prepared: Any) -> np.ndarray:
    return block.values.max(0)


GREATEST = MergeMethod(name="greatest", summary="", source="", space="delta", base="needed", combine=combine)


def offer(monkeypatch: pytest.MonkeyPatch, offered: Any, name: str = "greatest") -> None:
    known = methods.discover(methods.__name__, methods.GROUP)
    monkeypatch.setattr(methods, "discover", lambda *_: known | {name: offered})


def test_a_package_offers_a_module_with_the_method_or_the_method_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("greatest")
    module.METHOD = GREATEST  # type: ignore[attr-defined]
    for offered in (module, GREATEST):
        with monkeypatch.context() as patch:
            offer(patch, offered)
            assert methods.find("greatest") is GREATEST


def test_what_is_no_method_or_has_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        offer(patch, ModuleType("greatest"))
        with pytest.raises(UsageError, match="'greatest' of an installed package is not a MergeMethod"):
            methods.available()
    offer(monkeypatch, GREATEST, "largest")
    with pytest.raises(UsageError, match="offered as 'largest' calls itself 'greatest'"):
        methods.available()


def test_a_method_that_computes_nothing_can_not_be_made() -> None:
    with pytest.raises(TypeError, match="nothing has neither combine nor elementwise"):
        MergeMethod(name="nothing", summary="", source="", space="delta", base="needed")


def test_every_built_in_says_what_it_is_and_where_it_comes_from() -> None:
    for method in methods.available().values():
        assert method.summary
        assert method.source
