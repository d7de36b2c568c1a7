"""Bake modes: a file of the folder is one, with its options, and `steer bake` finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steer.training import modes
from steer.training.modes.contrast import ContrastRequest
from steer.training.modes.imitate import ImitateRequest
from steer.training.modes.prefer import PreferRequest
from vectors.errors import UsageError

MODE = '''
"""A mode that trains nothing."""

from dataclasses import dataclass

from steer.training.requests import BakeRequest
from vectors.registry.options import option

MODE = "echo"
SUMMARY = "by saying what was given"
NEEDS = ("word",)


@dataclass(frozen=True, kw_only=True)
class EchoRequest(BakeRequest):
    """A word."""

    word: str = option("", help="The word.", group="Echo")


REQUEST = EchoRequest


def run(request, *, on_event):
    """The report."""
    return {"word": request.word, "models": {"base": {}}, "dose": {}, "retention": 1.0, "outputs": {}}
'''


def steer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`steer` with `folder` as a part of steer/training/modes/."""
    script = "import sys; from steer.training import modes; modes.__path__.append(sys.argv[1]); "
    script += "from steer.cli import main; main(sys.argv[2:])"
    return subprocess.run([sys.executable, "-c", script, str(folder), *arguments], capture_output=True, text=True)


def test_one_file_is_a_mode_with_its_options(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(MODE)
    help_text = " ".join(steer(tmp_path, "bake", "--help").stdout.split())
    assert "echo (by saying what was given)" in help_text
    assert "Echo: --word TEXT The word." in help_text
    echo = ("bake", "--mode", "echo", "--word", "hello", "-o", "out")
    done = steer(tmp_path, *echo, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["word"] == "hello"
    done = steer(tmp_path, *echo, "--steps", "3", "--via", "bias")
    assert done.returncode == 2
    assert "--steps belongs to --mode distil and --mode train, not to --mode echo" in done.stderr
    assert "--via belongs to --mode fold, not to --mode echo" in done.stderr
    done = steer(tmp_path, "bake", "2*warm", *echo[1:])
    assert done.returncode == 2
    assert "a composition belongs to --mode distil and --mode fold" in done.stderr


def test_the_modes_are_listed_without_loading_torch() -> None:
    script = "import sys; from steer.training import modes; modes.available(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_of_the_files_that_share_a_mode_the_one_with_the_most_inputs_given_is_run() -> None:
    warm, cold = Path("warm.jsonl"), Path("cold.jsonl")
    assert modes.request_type("train", {}) is ImitateRequest
    assert modes.request_type("train", {"data": warm}) is ImitateRequest
    assert modes.request_type("train", {"data": warm, "against": cold}) is ContrastRequest
    assert modes.request_type("train", {"against": cold}) is ContrastRequest
    assert modes.request_type("train", {"pairs": warm}) is PreferRequest
    with pytest.raises(UsageError, match="there is no mode 'trian'") as caught:
        modes.request_type("trian", {})
    assert "did you mean train" in caught.value.hint


def test_a_request_of_no_mode_is_a_defect() -> None:
    with pytest.raises(TypeError, match="no mode takes a int"):
        modes.run(3)  # type: ignore[arg-type]
