"""The house: arrows point down, rooms stay small, nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOOR = {"vectors": 0, "probes": 1, "merges": 1, "steer": 2}
FILES = [path for package in FLOOR for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_only_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    up = [name for name in imports(path) if name in FLOOR and name != own and FLOOR[name] >= FLOOR[own]]
    assert up == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_below_the_workbench_prints_or_knows_the_command_line(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "steer":
        return
    assert not {"click", "vllm", "fastapi"} & set(imports(path))
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_no_file_has_grown_past_400_lines() -> None:
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 400] == []


def test_nothing_unpickles() -> None:
    for path in FILES:
        text = path.read_text()
        assert not {"dill", "joblib"} & set(imports(path)), path
        assert not re.search(r"pickle\.(loads?|Unpickler)\b|from pickle import .*(load|Unpickler)", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_importing_steer_and_its_command_line_loads_nothing_heavy() -> None:
    script = "import sys, steer, steer.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had_and_is_listed_in_order() -> None:
    import steer

    assert steer.__all__ == sorted(steer.__all__)
    assert set(steer._homes()) == set(steer.__all__)
    for name in steer.__all__:
        assert getattr(steer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'wrong'"):
        steer.wrong  # noqa: B018


def test_every_command_has_help_and_stands_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    from steer.cli import root, run

    readme = (ROOT / "README.md").read_text()
    for name in root.list_commands(None):  # type: ignore[arg-type]
        assert f"steer {name}" in readme
        assert run([name, "--help"]) == 0
        assert "Usage: steer " + name in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["steer.cli", "probes.models.loading", "vectors", "merges.dare", "test_house", "pico"]
)
def test_a_warning_of_our_own_code_fails_a_test(module: str) -> None:
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)


@pytest.mark.parametrize("module", ["torch.jit", "vectorstore.api", "steering", "numpy"])
def test_a_warning_of_another_package_does_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)
    assert len(seen) == 1
