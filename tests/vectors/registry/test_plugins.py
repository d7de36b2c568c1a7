"""Plugins: a file in a folder or an entry point is all that a new method takes, and no name stands for two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

from vectors.errors import UsageError
from vectors.formats import formats
from vectors.registry import plugins
from vectors.registry.plugins import choose, discover, discover_as

GROUP = "steer.made_up_methods"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was discovered is remembered for the life of a process."""
    discover.cache_clear()
    yield
    discover.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable package of two methods, and of files that are none."""
    name = "methods_of_a_test"
    folder = tmp_path / name
    folder.mkdir()
    for file in ("__init__", "beta", "alpha", "_common"):
        (folder / f"{file}.py").write_text(f"SUMMARY = {file!r}\n")
    (folder / "notes.txt").write_text("no module")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] in (name, "outside_of_a_test")]:
        del sys.modules[module]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an outside package offer modules under names, as its entry points would."""
    offered: list[EntryPoint] = []

    def entry_points(group: str) -> list[EntryPoint]:
        return [point for point in offered if point.group == group]

    monkeypatch.setattr(plugins, "entry_points", entry_points)

    def add(name: str, source: str = "SUMMARY = 'outside'\n", group: str = GROUP) -> None:
        outside = tmp_path / "outside_of_a_test"
        outside.mkdir(exist_ok=True)
        (outside / "__init__.py").touch()
        (outside / f"module{len(offered)}.py").write_text(source)
        offered.append(EntryPoint(name, f"outside_of_a_test.module{len(offered)}", group))

    return add


def test_every_module_of_a_folder_is_found_by_its_name_in_order(package: str, offer: Any) -> None:
    found = discover(package, GROUP)
    assert list(found) == ["alpha", "beta"]
    assert found["alpha"].SUMMARY == "alpha"


def test_a_file_that_is_added_is_found(package: str, offer: Any, tmp_path: Path) -> None:
    (tmp_path / package / "gamma.py").write_text("SUMMARY = 'added'\n")
    assert discover(package, GROUP)["gamma"].SUMMARY == "added"


def test_the_formats_of_vectors_are_found_so(monkeypatch: pytest.MonkeyPatch, offer: Any) -> None:
    assert {"native", "gguf", "caa"} <= set(formats())
    assert not any(name.startswith("_") for name in formats())


class Contract(Protocol):
    """What the modules of a test must define."""

    SUMMARY: str
    SOURCE: str

    def run(self) -> int:
        """Run."""

    def _private(self) -> None: ...


def test_modules_that_lack_a_name_of_their_contract_are_refused_all_at_once(package: str, offer: Any) -> None:
    offer("outside", "SUMMARY = SOURCE = ''\ndef run(): ...\n")
    with pytest.raises(UsageError) as caught:
        discover_as(Contract, "test method", package, GROUP)
    assert list(caught.value.problems) == [
        f"the test method {name!r} has no {missing}" for name in ("alpha", "beta") for missing in ("SOURCE", "run")
    ]
    assert "update the package" in caught.value.hint


def test_an_outside_module_without_a_name_of_its_contract_is_refused_for_every_kind(package: str, offer: Any) -> None:
    from probes import scores
    from probes.data import formats as forms
    from probes.directions import methods
    from steer.folding import injections
    from steer.training import modes, optimisers

    kinds: dict[str, Callable[[], Any]] = {
        "steer.scores": scores.scores, "steer.example_formats": forms.available,
        "steer.extraction_methods": methods.methods, "steer.injections": injections.available,
        "steer.bake_modes": modes.available, "steer.optimisers": optimisers.available, "steer.vector_formats": formats,
    }  # fmt: skip
    for group, available in kinds.items():
        discover.cache_clear()
        offer("outside", "NOTHING = 0\n", group=group)
        with pytest.raises(UsageError, match="'outside' has no "):
            available()
    discover.cache_clear()


def test_an_entry_point_joins_the_built_in_ones(package: str, offer: Any) -> None:
    offer("outside")
    found = discover(package, GROUP)
    assert list(found) == ["alpha", "beta", "outside"]
    assert isinstance(found["outside"], ModuleType)
    assert found["outside"].SUMMARY == "outside"


def test_an_entry_point_of_another_group_does_not_join(package: str, offer: Any) -> None:
    offer("outside", group="steer.other_methods")
    assert "outside" not in discover(package, GROUP)


def test_an_entry_point_with_the_name_of_a_built_in_is_refused(package: str, offer: Any) -> None:
    offer("alpha")
    with pytest.raises(
        UsageError, match=rf"outside_of_a_test\.module0 offers 'alpha' in {GROUP}, a name that is taken"
    ):
        discover(package, GROUP)


def test_two_entry_points_of_one_name_are_refused(package: str, offer: Any) -> None:
    offer("outside")
    offer("outside")
    with pytest.raises(UsageError, match=r"module1 offers 'outside' .* a name that is taken") as caught:
        discover(package, GROUP)
    assert "uninstall" in caught.value.hint


@pytest.mark.parametrize("source", ["import no_such_module", "raise RuntimeError('broken')", "syntax error"])
def test_an_entry_point_that_can_not_be_loaded_is_named(package: str, offer: Any, source: str) -> None:
    offer("outside", source)
    with pytest.raises(UsageError, match=r"outside_of_a_test\.module0, which offers 'outside' .* can't be loaded"):
        discover(package, GROUP)


def test_a_refusal_is_not_remembered_when_its_cause_is_gone(
    package: str, offer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer("alpha")
    with pytest.raises(UsageError):
        discover(package, GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    assert list(discover(package, GROUP)) == ["alpha", "beta"]


AVAILABLE = {name: ModuleType(name) for name in ("whitened", "diffmean", "pca")}


def test_a_name_that_is_there_is_chosen() -> None:
    assert choose("method", "pca", AVAILABLE) is AVAILABLE["pca"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("difmean", "diffmean"), ("DIFF", "diffmean"), ("caa", "diffmean"), ("pcaa", "pca")]
)
def test_a_name_that_is_not_there_is_guessed_and_all_are_listed(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"there is no method '{typed}'") as caught:
        choose("method", typed, AVAILABLE)
    assert caught.value.hint == f"did you mean {meant}? available: diffmean, pca, whitened"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("typed", ["", "xyz", "QQ"])
def test_a_name_like_no_other_is_not_guessed(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose("method", typed, AVAILABLE)
    assert caught.value.hint == "available: diffmean, pca, whitened"
