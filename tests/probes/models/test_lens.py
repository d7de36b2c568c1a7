"""Layer i is what TransformerLens calls `blocks.{i}.hook_resid_post`. Runs where the extra `lens` is installed."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from torch import Tensor, nn

from probes.capture.activations import activations
from probes.models import loading, residual
from probes.models.tokens import Tokens
from probes.steered import steered
from vectors.steering import SteeringVector

pytestmark = pytest.mark.slow
NAMES = ("llama", "gpt2", "qwen3")
CLOSE = 1e-5  # relative to the norm of the residual stream, float32


@pytest.mark.parametrize("name", NAMES)
def test_layer_i_is_hook_resid_post_of_block_i(name: str, tmp_path: Path) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="the extra `lens` is not installed")
    folder = pico.save(tmp_path / name, name, num_key_value_heads=4)  # which TransformerLens believes of a GPT-2 too
    ids = pico.sequences(1, 9, 9)[0]
    bridge = bridges.TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    names = [f"blocks.{i}.hook_resid_post" for i in range(pico.LAYERS)]

    def theirs() -> list[Tensor]:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(torch.tensor([ids]), names_filter=names)
        return [cache[each][0] for each in names]

    ours = loading.load(folder, "cpu", "float32").model
    pooled = activations(ours, [Tokens(ids, [4])], range(pico.LAYERS))
    with pooled.spill:
        for i, state in enumerate(theirs()):
            assert distance(pooled.spill.read(i)[0], state[4]) < CLOSE

    vector = SteeringVector({1: torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(1))})
    bridge.add_hook(names[1], lambda states, hook: states + 2 * vector.layers[1])
    with steered(ours, "2*warm", vectors={"warm": vector}), torch.inference_mode():
        last = residuals(ours, ids)
    assert distance(last, theirs()[-1]) < CLOSE


def residuals(ours: nn.Module, ids: list[int]) -> Tensor:
    """What leaves the last block, [tokens, hidden]."""
    seen: list[Tensor] = []
    handle = residual.blocks(ours)[-1].register_forward_hook(lambda _m, _i, out: seen.append(residual.output_of(out)))
    ours(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
