"""Where the residual stream is: the decoder blocks whose outputs are `hidden_states[1:]` (before the final norm).

One small table for the architectures that were tested, and a fallback that finds the blocks and proves, on a few
tokens, that their outputs are the residual stream. What neither knows is an error, not a guess.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vectors.errors import ModelError


class Layout(NamedTuple):
    """How the decoder of an architecture is built.

    `packs`: attention is the only thing that mixes tokens, and positions come from `position_ids`, so that a tree of
    sequences can share one forward pass.
    """

    blocks: str  # the path of the list of blocks below the decoder
    packs: bool


LAYOUTS = {
    "gemma": Layout("layers", True),
    "gemma2": Layout("layers", True),
    "gemma3_text": Layout("layers", True),
    "gpt2": Layout("h", True),
    "gpt_neox": Layout("layers", True),
    "lfm2": Layout("layers", False),  # convolutions mix neighbours
    "llama": Layout("layers", True),
    "mistral": Layout("layers", True),
    "mixtral": Layout("layers", True),
    "olmo2": Layout("layers", True),
    "phi3": Layout("layers", True),
    "qwen2": Layout("layers", True),
    "qwen3": Layout("layers", True),
    "qwen3_next": Layout("layers", False),  # Gated DeltaNet carries a recurrent state
}


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks without the language-model head."""
    get_decoder = getattr(model, "get_decoder", None)
    stack = get_decoder() if get_decoder is not None else None
    return stack if isinstance(stack, nn.Module) else getattr(model, "base_model", model)


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, also inside a multi-modal model."""
    return text_part(model.config)


def text_part(config: Any) -> Any:
    """The part of a configuration that is about the text decoder."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_length(config: Any) -> int | None:
    """The most tokens that a model of this configuration can read, or None where it states no limit."""
    limit = getattr(text_part(config), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def layout(model: nn.Module) -> Layout | None:
    """The table's row for this model, or None."""
    return LAYOUTS.get(str(getattr(text_config(model), "model_type", "")))


def hidden_size(model: nn.Module) -> int:
    """The size of the residual stream."""
    return int(text_config(model).hidden_size)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order: the output of block i is layer i. Raises ModelError."""
    known = layout(model)
    stack = decoder(model)
    if known is not None:
        return list(stack.get_submodule(known.blocks))  # type: ignore[call-overload]
    kind = getattr(text_config(model), "model_type", type(model).__name__)
    count = getattr(text_config(model), "num_hidden_layers", None)
    candidates = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(candidates) == 1 and _carry_the_residual_stream(stack, list(candidates[0]), hidden_size(model)):
        return list(candidates[0])
    raise ModelError(
        f"the architecture {kind!r} is unknown: no stack of {count} blocks whose outputs are its hidden states",
        "add one line to LAYOUTS in probes/models/residual.py, and a pico model to its test",
    )


def _carry_the_residual_stream(stack: nn.Module, candidates: list[nn.Module], size: int) -> bool:
    """Whether the blocks' outputs are the residual stream [batch, tokens, hidden] of a causal decoder.

    Each must be what the next block takes and what the model returns as its hidden state (except the last, which it
    returns after the final norm), and tokens must not see what follows them. Two sequences that differ in their last
    token show it.
    """
    inputs: list[Any] = []
    outputs: list[Tensor] = []

    def record(_block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(args[0] if args else kwargs.get("hidden_states"))
        outputs.append(output_of(output))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in candidates]
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=next(stack.parameters()).device)
    try:
        with torch.inference_mode():
            states = stack(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    except Exception:  # a model that can't be called this way may raise anything; its architecture stays unknown
        return False
    finally:
        for handle in handles:
            handle.remove()
    if states is None or not len(states) == len(candidates) + 1 == len(outputs) + 1:
        return False
    last = outputs[-1]
    tolerance = torch.finfo(last.dtype).eps ** 0.5 * float(last.abs().max())
    return (
        all(state.shape == (*ids.shape, size) for state in outputs)
        and all(torch.equal(a, b) for a, b in zip(states[1:-1], outputs[:-1], strict=True))
        and all(isinstance(a, Tensor) and torch.equal(a, b) for a, b in zip(inputs[1:], outputs[:-1], strict=True))
        and torch.allclose(last[0, :-1], last[1, :-1], rtol=0, atol=tolerance)
    )


def output_of(output: Any) -> Tensor:
    """The residual stream [batch, tokens, hidden] in what a block returned: a tensor, or a tuple that it leads."""
    return output if isinstance(output, Tensor) else output[0]
