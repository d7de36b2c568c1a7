"""`steer vectors convert` asks what the first row of a stack is, which the file does not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steer.cli import run


def test_a_stack_is_converted_when_its_first_row_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack, out = tmp_path / "stack.pt", tmp_path / "v.safetensors"
    torch.save(torch.arange(1.0, 8.0)[:, None].expand(7, 4).clone(), stack)
    assert run(["vectors", "convert", str(stack), str(out)]) == 1
    refused = capsys.readouterr().err
    assert "does not say whether its first row is the embeddings" in refused
    assert "--first-row block-0" in refused
    assert not out.exists()
    assert run(["vectors", "convert", str(stack), str(out), "--first-row", "block-0"]) == 0
    capsys.readouterr()
    assert run(["vectors", "show", str(out), "--json"]) == 0
    assert [entry["layer"] for entry in json.loads(capsys.readouterr().out)["layers"]] == list(range(7))
