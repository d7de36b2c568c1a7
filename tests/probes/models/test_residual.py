"""The residual stream is found where it is, proved where the table is silent, and refused where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from probes.models import residual
from vectors import architectures
from vectors.errors import ModelError

IDS = torch.tensor([[7, 30, 99, 12, 5, 140, 61], [8, 8, 200, 3, 17, 90, 41]])


def outputs(model: Any, blocks: list[nn.Module]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """What hooks see leave the blocks, and the model's own hidden states."""
    seen: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _i, out: seen.append(residual.output_of(out))) for b in blocks]
    try:
        with torch.inference_mode():
            states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    return seen, states


def assert_outputs_are_hidden_states(model: Any) -> None:
    found = residual.blocks(model)
    seen, states = outputs(model, found)
    assert len(found) == len(seen) == pico.LAYERS
    assert len(states) == pico.LAYERS + 1
    for output, state in zip(seen[:-1], states[1:-1], strict=True):
        assert torch.equal(output, state)
    norms = [m for m in residual.decoder(model).children() if isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__]
    assert torch.allclose(norms[-1](seen[-1]), states[-1], rtol=1e-5, atol=1e-6)


def test_layer_i_is_hidden_state_i_plus_1(model: Any) -> None:
    assert_outputs_are_hidden_states(model)


def test_the_hidden_size_is_that_of_the_stream(model: Any) -> None:
    assert residual.hidden_size(model) == pico.HIDDEN
    assert outputs(model, residual.blocks(model))[0][0].shape == (*IDS.shape, pico.HIDDEN)


def test_the_fallback_finds_what_the_table_says(model: Any, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_table = residual.blocks(model)
    monkeypatch.delitem(architectures.ARCHITECTURES, pico.ARCHITECTURES[architecture][0])
    assert residual.architecture(model) is None
    assert [id(block) for block in residual.blocks(model)] == [id(block) for block in by_table]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", pico.UNKNOWN)
def test_the_fallback_takes_an_architecture_that_the_table_does_not_know(
    name: str, dtype: torch.dtype, pico_model: Callable[..., Any]
) -> None:
    model = pico_model(name, attention="eager", dtype=dtype)
    assert residual.architecture(model) is None
    found = residual.blocks(model)
    assert pico.hooks(model) == 0
    seen, states = outputs(model, found)
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], states[1:-1], strict=True))


class Block(nn.Module):
    """A block that adds to the stream, and returns the sum or only what it adds."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.adds = adds

    def forward(self, stream: Tensor, residual: Tensor | None = None) -> Any:
        change = torch.tanh(self.linear(stream if residual is None else stream + residual))
        if residual is not None:
            return change, stream + residual
        return stream + change if self.adds else change


class Stack(nn.Module):
    """A decoder that no table knows. `reports` says which hidden states it shows, `between` what it does to the stream.

    Between two blocks it may scale or normalise the stream, or hand it over in two halves.
    """

    def __init__(
        self, *, adds: bool = True, reports: str = "stream", between: str = "nothing", looks_ahead: bool = False,
        reads_padding: bool = False, extra: int = 0, size: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = SimpleNamespace(model_type="made-up", num_hidden_layers=3, hidden_size=size)
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block(adds) for _ in range(3))
        self.more = nn.ModuleList(nn.Linear(8, 8) for _ in range(extra))
        self.norm = nn.RMSNorm(8)
        self.reports, self.between, self.looks_ahead = reports, between, looks_ahead
        self.reads_padding = reads_padding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False,
        use_cache: bool = False,
    ) -> Any:  # fmt: skip
        stream = self.embed(input_ids)
        if attention_mask is not None and not self.reads_padding:
            stream = stream * attention_mask[..., None]
        stream = stream + 0.1 * stream.cumsum(1)
        if self.looks_ahead:
            stream = stream + stream.mean(1, keepdim=True)
        states = [stream]
        half = torch.zeros_like(stream)
        for block in self.blocks:
            if self.between == "halves":
                output, half = block(stream, half)
                stream = output
            else:
                output = block(stream)
                stream = output if block.adds else stream + output
            states.append({"others": 2 * stream, "outputs": output}.get(self.reports, stream))
            if self.between == "scaled":
                stream = 0.5 * stream
            elif self.between == "normalised":
                stream = stream / stream.pow(2).mean(-1, keepdim=True).sqrt()
        last = self.norm(2 * stream if self.between == "scaled at the end" else stream)
        hidden = None if self.reports == "nothing" else tuple(states)
        if self.reports == "from the first block on":
            hidden = (*states[1:], last)
        return SimpleNamespace(hidden_states=hidden, last_hidden_state=last)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("reports", ["stream", "nothing", "from the first block on"])
def test_a_stack_whose_blocks_return_the_stream_is_taken(reports: str) -> None:
    stack = Stack(reports=reports)
    assert residual.blocks(stack) == list(stack.blocks)
    assert pico.hooks(stack) == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"adds": False}, "block 1 takes something else than what block 0 returned"),
        ({"adds": False, "reports": "outputs"}, "block 1 takes something else than what block 0 returned"),
        ({"between": "scaled"}, "block 1 takes 0.5 times what block 0 returned"),
        ({"between": "scaled at the end"}, "what follows the last block takes 2 times what block 2 returned"),
        ({"between": "normalised"}, "block 1 takes a normalised form of what block 0 returned"),
        ({"between": "halves"}, "block 2 takes a second stream, which follows from the outputs of the blocks"),
        ({"reports": "others"}, "its hidden state 1 is not what block 0 returned"),
        ({"size": 9}, r"block 0 returns \[2, 4, 8\], not one stream \[2, 4, 9\]"),
        ({"looks_ahead": True}, "tokens see what follows them"),
        ({"reads_padding": True}, "tokens see the padding before them"),
        ({"extra": 3}, "it has 2 lists of 3 modules"),
    ],
)
def test_a_stack_whose_blocks_do_not_carry_the_stream_is_refused_with_the_reason(
    settings: dict[str, Any], reason: str
) -> None:
    stack = Stack(**settings)
    with pytest.raises(ModelError, match=f"the architecture 'made-up' is unknown, and .*: {reason}") as caught:
        residual.blocks(stack)
    assert "vectors/architectures/table.py" in caught.value.hint
    assert pico.hooks(stack) == 0


def test_what_was_proved_once_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack()
    residual.blocks(stack)
    monkeypatch.setattr(stack, "forward", None)
    assert residual.blocks(stack) == list(stack.blocks)


def test_a_stack_that_can_not_be_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack()
    monkeypatch.setattr(stack.blocks[1], "forward", lambda stream: stream @ torch.ones(3, 3))  # RuntimeError
    with pytest.raises(ModelError, match="made-up"):
        residual.blocks(stack)
    assert pico.hooks(stack) == 0


@pytest.mark.parametrize(("name", "shape"), [("gemma3n", r"\[4, 2, 4, 32\]"), ("deepseek-v4", r"\[2, 4, 4, 32\]")])
def test_a_stream_of_several_copies_is_refused(name: str, shape: str, pico_model: Callable[..., Any]) -> None:
    """Gemma 3n carries four streams, DeepSeek-V4 as many through hyper-connections."""
    with pytest.raises(ModelError, match=f"is unknown, and .*: block 0 returns {shape}, not one stream"):
        residual.blocks(pico_model(name))


def test_an_encoder_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **pico.COMMON)).eval()
    with pytest.raises(ModelError, match="'bert' is unknown"):
        residual.blocks(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # whatever TransformerLens warns of is its own affair
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt-neox", "olmo2"])
def test_layer_i_is_hook_resid_post_of_transformer_lens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: the extra lens")
    from transformer_lens.model_bridge import TransformerBridge

    # As many key heads as heads: it would read the number from configurations whose models do not know it.
    folder = pico.save(tmp_path / name, name, num_key_value_heads=4)
    # Its own attention is eager, too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen, _ = outputs(model, residual.blocks(model))
    with torch.inference_mode():
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        _, cache = bridge.run_with_cache(IDS)
    for layer, states in enumerate(seen):
        theirs = cache[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(states, theirs, rtol=1e-4, atol=1e-4 * float(states.abs().max()))
        others = [cache[f"blocks.{i}.hook_resid_post"] for i in range(pico.LAYERS) if i != layer]
        assert all(float((states - other).abs().max()) > 0.1 for other in others)
