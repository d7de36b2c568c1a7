"""Paths that no file can have, or whose names are hostile, give one clear and short error with the right exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from steer.cli import run

PATHS = {
    "a long name": "x" * 5000,
    "a long path": "/".join(["d" * 100] * 60),
    "no UTF-8": os.fsdecode(b"bad\xff.safetensors"),
    "escapes": "\x1b]0;title\x07\x1b[31m\u202e.safetensors",
    "nothing": "",
}
COMMANDS = {
    "show": ["vectors", "show", "PATH"],
    "convert": ["vectors", "convert", "PATH", "out.gguf"],
    "compare": ["vectors", "compare", "PATH", "PATH"],
    "extract": ["extract", "--pos", "PATH", "--neg", "PATH", "-o", "out.safetensors"],
    "try": ["try", "PATH", "-p", "hello"],
    "merge": ["merge", "PATH", "PATH", "-o", "out", "--base", "PATH"],
    "recipe": ["merge", "--recipe", "PATH", "-o", "out"],
    "verify": ["merge", "--verify", "PATH"],
    "apply": ["apply", "PATH", "PATH", "-o", "out"],
    "diff": ["diff", "PATH", "PATH", "-o", "out.safetensors"],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_one_clear_error(
    command: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [path if word == "PATH" else word for word in command]
    assert run(arguments) in (1, 2)
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert "defect of steer" not in printed.err
    assert len(printed.err) < 10_000
    assert not any(character < " " and character not in "\n\t" for character in printed.err)
    printed.err.encode()  # no half characters either
    assert run([*arguments, "--json"]) in (1, 2)
    out = capsys.readouterr().out
    out.encode()
    assert "\x1b" not in out
    assert json.loads(out)["problems"]
    assert list(tmp_path.iterdir()) == []
