"""Planted vectors neither overflow nor vanish, whatever the dtype and the stream; no wrong claim passes by chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_decoders import (
    LAYERS,
    PROVED,
    TOKENS,
    Block,
    Decoder,
    Halves,
    Normalised,
    PostNorm,
    Scaled,
    SideChannel,
    Whole,
    WithUnused,
    proved,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from steer.serving.engine.proving import planting
from steer.serving.engine.proving.forms import Form, Passes, Refused
from steer.serving.engine.proving.proof import prove
from vectors import references


def massive(kind: type[Block], *, always: bool) -> type[Block]:
    """Blocks that write a massive activation, as trained models do: for streams of usual length, or always."""

    class Massive(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            output = super().forward(*args)
            first = output[0] if isinstance(output, tuple) else output
            usual = sum(part for part in args[1:] if part is not None).abs().amax(1) < 100
            first[:, 3] += 25_000 * (usual | torch.tensor(always))
            return output

    return Massive


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("name", ["halves", "whole", "with an unused part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_deep_model_with_massive_activations_is_proved(name: str, dtype: torch.dtype, always: bool) -> None:
    kind, form = PROVED[name]
    model = Decoder([kind] * 3 + [massive(kind, always=always)] + [kind] * 20).to(dtype)
    assert set(proved(model, 24).values()) == {form}


@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 100.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_of_any_length_is_proved(size: float, dtype: torch.dtype) -> None:
    for kind in (Halves, Whole, PostNorm):
        model = Decoder([kind] * LAYERS)
        with torch.no_grad():
            model.embeddings.weight.mul_(size)
        assert len(proved(model.to(dtype))) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_massive_activation_hides_no_wrong_claim(dtype: torch.dtype) -> None:
    marked = massive(WithUnused, always=True)
    with pytest.raises(Refused, match="SideChannel at layer 2 depends on another part"):
        proved(Decoder([WithUnused, marked, SideChannel, SideChannel]).to(dtype))
    for last, reason in ((Scaled, "multiplies the stream by 0.5"), (Normalised, "is not in what it returns")):
        with pytest.raises(Refused, match=f"{last.__name__} .*layer 3 {reason}"):
            proved(Decoder([Whole, massive(Whole, always=True), Whole, last]).to(dtype))


@pytest.mark.parametrize("length", [0.25, 1.0, 4.0, 1000.0])
def test_a_norm_that_leaves_vectors_of_just_the_planted_length_is_caught(length: float) -> None:
    class NormedTo(Whole):
        def forward(self, positions: Tensor, hidden: Tensor) -> Any:
            return length * self.norm(super().forward(positions, hidden))

    with pytest.raises(Refused, match="is not in what it returns as the stream"):
        proved(Decoder([NormedTo] * LAYERS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_that_is_scaled_by_little_is_refused(dtype: torch.dtype) -> None:
    class Shrunk(Whole):
        def forward(self, positions: Tensor, hidden: Tensor) -> Any:
            return 0.98 * super().forward(positions, hidden)

    with pytest.raises(Refused, match=r"Shrunk at layer 2 multiplies the stream by 0\.98"):
        proved(Decoder([Whole, Whole, Shrunk, Whole]).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_real_model_whose_first_tokens_have_massive_activations_is_proved(dtype: torch.dtype) -> None:
    """As in the passes of vLLM's runners, each token is the first of its sequence."""
    model = AutoModelForCausalLM.from_pretrained(references.resolve("smollm2").path, dtype=dtype).eval()
    ids = torch.randint(1000, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    alone = torch.zeros(1, 1, TOKENS, TOKENS, dtype=dtype).masked_fill(~torch.eye(TOKENS, dtype=torch.bool), -10_000)

    def run() -> Tensor:
        output: Tensor = model.model(input_ids=ids, attention_mask=alone, use_cache=False).last_hidden_state
        return output

    result = prove(model, 30, 576, run)
    assert {form for _, form in result.values()} == {Form(None, batched=True)}
    passes = Passes(model, {layer: block for layer, (block, _) in result.items()}, run, 576)
    assert max(float(step.returned[0].abs().max()) for step in passes.base.steps.values()) > 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.02, 0.5, 3.0])
def test_a_stream_that_transformers_scales_too_is_accepted(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Multiplied(Whole):
        def forward(self, positions: Tensor, hidden: Tensor) -> Any:
            return factor * super().forward(positions, hidden)

    monkeypatch.setattr(planting, "SCALED", {"Multiplied"})
    assert set(proved(Decoder([Multiplied] * LAYERS).to(dtype)).values()) == {"whole"}
