"""The passes by which the proof learns a loaded model, through a stand-in for vLLM's runner."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer.serving.engine.proving.forms import Refused
from steer.serving.engine.proving.probing import proved_blocks

HIDDEN, LAYERS, VOCABULARY = 16, 3, 50


class Attention(nn.Module):
    """vLLM's attention: without a cache it leaves its output unwritten."""

    num_heads, num_kv_heads = 4, 2

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.full_like(query, torch.nan)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.values = nn.Linear(HIDDEN, HIDDEN // 2)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        normed = nn.functional.rms_norm(hidden, (HIDDEN,))
        return hidden + self.attention(normed, normed, self.values(normed))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.do_not_compile = False
        self.read: list[Tensor] = []

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        assert self.do_not_compile, "a pass is not compiled"
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        self.read.append(hidden)
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.norm(hidden)


class Runner:
    """vLLM's runner: its passes read zeros."""

    max_num_tokens = 64

    def __init__(self, model: Model, *, embeds: bool = False, error: Exception | None = None) -> None:
        self.model, self.embeds, self.error = model, embeds, error
        self.calls: list[dict[str, Any]] = []

    def get_model(self) -> Model:
        return self.model

    def _dummy_run(self, tokens: int, **arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        ids = torch.zeros(tokens, dtype=torch.int32)
        embeds = torch.zeros(tokens, HIDDEN) if self.embeds else None
        self.model(input_ids=None if self.embeds else ids, positions=ids, inputs_embeds=embeds)


def config(ranks: int = 1) -> Any:
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: LAYERS,
        get_hidden_size=lambda: HIDDEN,
        get_vocab_size=lambda: VOCABULARY,
    )
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=ranks))


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """vLLM's modules that the passes import; a call sets how the second rank's values differ."""
    names = ("vllm.config", "vllm.distributed", "vllm.model_executor.layers.attention")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["vllm.config"].set_current_vllm_config = lambda _config: nullcontext()
    modules["vllm.model_executor.layers.attention"].Attention = Attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def ranks(second: Callable[[Tensor], Tensor]) -> None:
        group = SimpleNamespace(all_gather=lambda mine, dim: torch.cat([mine, second(mine)], dim))
        modules["vllm.distributed"].get_tp_group = lambda: group

    return ranks


@pytest.mark.parametrize("embeds", [False, True])
def test_the_passes_read_random_tokens_the_same_each_time_and_are_not_compiled(embeds: bool) -> None:
    model = Model()
    runner = Runner(model, embeds=embeds)
    assert {form.name for _, form in proved_blocks(runner, config(), second=False).values()} == {"whole"}
    assert len({tuple(read.flatten().tolist()) for read in model.read}) == 1
    assert len(model.read[0].unique(dim=0)) > 1, "the tokens differ from each other"
    assert not model.do_not_compile
    assert "forward" not in model.layers[0].attention.__dict__
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize(("second", "argument"), [(False, "skip_eplb"), (True, "skip_attn")])
def test_each_runner_makes_the_pass_by_which_it_measures_memory(second: bool, argument: str) -> None:
    runner = Runner(Model())
    proved_blocks(runner, config(), second=second)
    assert all(call == {"is_profile": True, argument: True} for call in runner.calls)


def test_a_pass_that_fails_is_a_refusal_with_the_reason() -> None:
    with pytest.raises(Refused, match=r"a pass through Model fails.*RuntimeError: no kernel"):
        proved_blocks(Runner(Model(), error=RuntimeError("no kernel")), config(), second=False)


def test_an_error_without_a_text_is_named_by_its_line() -> None:
    with pytest.raises(Refused, match=r"AssertionError: raise self\.error \(test_proving_passes\.py:\d+\)"):
        proved_blocks(Runner(Model(), error=AssertionError()), config(), second=False)


def test_a_block_that_vllm_compiles_by_itself_is_refused() -> None:
    model = Model()
    model.layers[1].do_not_compile = False  # type: ignore[assignment]
    with pytest.raises(Refused, match="vLLM compiles Block at layer 1 by itself, so it would run unsteered"):
        proved_blocks(Runner(model), config(), second=False)
    model.layers[1].do_not_compile = True  # type: ignore[assignment]
    assert len(proved_blocks(Runner(model), config(), second=False)) == LAYERS


def test_a_stream_that_differs_between_ranks_is_refused(vllm: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
    vllm(lambda mine: mine)
    assert len(proved_blocks(Runner(Model()), config(2), second=False)) == LAYERS
    vllm(lambda mine: torch.cat([mine[:, :1], 2 * mine[:, 1:]], 1))
    with pytest.raises(Refused, match="Block at layer 1 returns another stream on each rank"):
        proved_blocks(Runner(Model()), config(2), second=False)
