"""Which tests of engines run on which of vLLM's model runners."""

from __future__ import annotations

import sys
from pathlib import Path

import engine_process
import pytest
import torch


def test_v2_needs_a_gpu_or_triton_in_a_folder_that_only_the_engines_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("STEER_TRITON", raising=False)
    monkeypatch.setenv("PYTHONPATH", "before")
    assert engine_process.environment_of("v1") == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert engine_process.environment_of("v2") is None
    (tmp_path / "triton-3.6.0").mkdir()
    environment = engine_process.environment_of("v2")
    assert environment is not None
    assert (environment["VLLM_USE_V2_MODEL_RUNNER"], environment["TRITON_INTERPRET"]) == ("1", "1")
    shim, triton, before = environment["PYTHONPATH"].split(":")
    assert (Path(shim) / "sitecustomize.py").is_file()
    assert (Path(triton), before) == (tmp_path / "triton-3.6.0", "before")
    assert triton not in sys.path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_process.environment_of("v2") == {"VLLM_USE_V2_MODEL_RUNNER": "1"}
