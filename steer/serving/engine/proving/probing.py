"""The pass through a loaded model by which `proof` learns where its blocks hold the residual stream.

It is the pass by which vLLM measures memory, a few tokens long: without a cache, and not compiled. Its tokens are
random, always the same ones and the same in every process; each counts as a sequence of its own, for which attention
returns the token's value.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.serving.engine.proving.forms import Proved, Refused, stream
from steer.serving.engine.proving.proof import prove
from steer.serving.engine.proving.trace import record

logger = logging.getLogger("vllm.steer")

TOKENS = 8


def proved_blocks(runner: Any, config: Any, *, second: bool) -> dict[int, Proved]:
    """The decoder blocks of a runner's model in this process, by layer; `second` is the V2 runner. Raises Refused."""
    started = time.perf_counter()
    model, count = runner.get_model(), int(config.model_config.get_total_num_hidden_layers())
    hidden = int(config.model_config.get_hidden_size())
    compiled = {id(module) for module in model.modules() if getattr(module, "do_not_compile", None) is False}
    with passes(runner, config, second=second) as run:
        proved = prove(model, count, hidden, run)
        _require_uncompiled_blocks(proved, compiled)
        if config.parallel_config.tensor_parallel_size > 1:
            _require_equal_on_all_ranks(model, proved, run, hidden)
    forms = sorted({f"{type(block).__name__}: {form.name}" for block, form in proved.values()})
    seconds = time.perf_counter() - started
    logger.info("steer: proved in %.2f s where the residual stream is (%s)", seconds, "; ".join(forms))
    return proved


def _require_uncompiled_blocks(proved: Mapping[int, Proved], compiled: Collection[int]) -> None:
    """vLLM compiles modules from the forward that they began with; none may be a block, whose forward is replaced.

    `compiled` are ids of modules. Raises Refused.
    """
    for layer, (block, _) in proved.items():
        if id(block) in compiled:
            raise Refused(
                f"steer: vLLM compiles {type(block).__name__} at layer {layer} by itself, so it would run unsteered. "
                "Serve the model with --enforce-eager, or without the plugin: unset VLLM_PLUGINS"
            )


def _require_equal_on_all_ranks(
    model: nn.Module, proved: Mapping[int, Proved], run: Callable[[], Any], hidden: int
) -> None:
    """With tensor parallelism each rank steers the stream: it must be whole on each, not a part of a sum.

    Raises Refused.
    """
    from vllm.distributed import get_tp_group

    trace = record(model, {layer: block for layer, (block, _) in proved.items()}, run, hidden)
    sums = [stream(proved[layer].form, step, step.returned, hidden).sum(1) for layer, step in trace.steps.items()]
    mine = torch.stack(sums).float().to(next(model.parameters()).device)
    ranks = get_tp_group().all_gather(mine[None].contiguous(), dim=0)
    largest = ranks.abs().amax(dim=(0, 2), keepdim=True)
    wrong = ((ranks - ranks[:1]).abs() > 0.05 * largest).any(dim=2).any(dim=0)
    if bool(wrong.any()):
        layer = sorted(proved)[int(wrong.nonzero()[0])]
        raise Refused(
            f"steer: with tensor parallelism, {type(proved[layer].block).__name__} at layer {layer} returns another "
            "stream on each rank. Serve the model without tensor parallelism, or without the plugin: unset VLLM_PLUGINS"
        )


@contextlib.contextmanager
def passes(runner: Any, config: Any, *, second: bool) -> Iterator[Callable[[], Any]]:
    """A context with a function that makes one pass through a runner's model and returns what the model does."""
    from vllm.config import set_current_vllm_config

    model, vocabulary = runner.get_model(), int(config.model_config.get_vocab_size())
    with set_current_vllm_config(config), _uncompiled(model), _attention_to_itself(model), _tokens(model, vocabulary):
        yield _pass(runner, second=second)


def _pass(runner: Any, *, second: bool) -> Callable[[], Any]:
    tokens = min(TOKENS, int(runner.max_num_tokens))
    arguments = {"skip_attn": True} if second else {"skip_eplb": True}
    outputs: list[Any] = []

    def run() -> Any:
        outputs.clear()
        handle = runner.get_model().register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            runner._dummy_run(tokens, is_profile=True, **arguments)
        except Refused:
            raise
        except Exception as error:
            raise Refused(
                f"steer: a pass through {type(runner.get_model()).__name__} fails, so it can't be proved where its "
                f"residual stream is: {_what_failed(error)}. To serve the model without the plugin, unset "
                "VLLM_PLUGINS"
            ) from error
        finally:
            handle.remove()
        return outputs[-1] if outputs else None

    return run


def _what_failed(error: Exception) -> str:
    """An error with its text; one without, as an assertion's, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error) or where}"


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """A context in which no module is compiled when it is called."""
    modules = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    for module in modules:
        module.do_not_compile = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.do_not_compile = False  # type: ignore[assignment]


@contextlib.contextmanager
def _attention_to_itself(model: nn.Module) -> Iterator[None]:
    """A context in which attention returns each token's value, as for a sequence of one token.

    Without a cache vLLM's own returns nothing, and then it would not show in a pass that blocks depend on it.
    """
    from vllm.model_executor.layers.attention import Attention

    changed = [module for module in model.modules() if isinstance(module, Attention)]

    def forward_of(layer: Any) -> Callable[..., Tensor]:
        def forward(query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
            if value is None:  # the keys and values of an earlier layer
                return torch.zeros_like(query)
            heads, groups = int(layer.num_heads), int(layer.num_kv_heads)
            values = value.reshape(query.shape[0], groups, -1).repeat_interleave(heads // groups, dim=1)
            return values.reshape(query.shape[0], -1)

        return forward

    for module in changed:
        module.__dict__["forward"] = forward_of(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


@contextlib.contextmanager
def _tokens(model: nn.Module, vocabulary: int) -> Iterator[None]:
    """A context in which the model reads random tokens, or embeddings or streams where it is given those."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generator = torch.Generator().manual_seed(7)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

        ids, embeddings, streams = (kwargs.get(k) for k in ("input_ids", "inputs_embeds", "intermediate_tensors"))
        if ids is not None:
            kwargs["input_ids"] = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device, ids.dtype)
        if embeddings is not None:
            kwargs["inputs_embeds"] = noise(embeddings)
        if streams is not None:
            kwargs["intermediate_tensors"] = type(streams)({k: noise(t) for k, t in streams.tensors.items()})
        return args, kwargs

    handle = model.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
