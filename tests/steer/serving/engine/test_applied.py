"""What `steer apply` writes is a model that vLLM and transformers load, and both compute the same with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pico
import torch
from engine_process import Engines, difference, reference, save_model
from test_parity import CLOSE
from transformers import AutoModelForCausalLM


def test_vllm_loads_what_apply_writes(
    stock: Engines, steer: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    base = save_model(tmp_path, "llama")
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    tuned.save_pretrained(tmp_path / "tuned")
    pico.tokenizer().save_pretrained(tmp_path / "tuned")
    vector, out = tmp_path / "v1.safetensors", tmp_path / "out"
    for command in (
        ["diff", base, tmp_path / "tuned", "-o", vector],
        ["apply", base, "0.5*v1", "--vector", f"v1={vector}", "-o", out],
    ):
        code, _, err = steer(*command)
        assert code == 0, err
    stock.start(out)
    ids = pico.sequences(1, 20, 20)[0]
    (answer,) = stock.generate([{"ids": ids, "steer": None}])
    applied, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, base))
    assert difference(answer, reference(applied, ids, answer["ids"], None, {})) < CLOSE
    assert difference(answer, reference(plain, ids, answer["ids"], None, {})) > 10 * CLOSE
