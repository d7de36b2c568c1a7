"""Where the residual stream is: the decoder blocks whose outputs are `hidden_states[1:]` (before the final norm).

The table of architectures says it (`vectors.architectures`); for what it does not know, the blocks are found and proved
to return the residual stream (`probes.models.stream_proof`). What can't be proved is an error, not a guess.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from probes.models import stream_proof
from probes.models.stream_proof import output_of as output_of
from vectors import architectures
from vectors.architectures import Architecture
from vectors.errors import ModelError


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks without the language-model head."""
    get_decoder = getattr(model, "get_decoder", None)
    stack = get_decoder() if get_decoder is not None else None
    # ModernBERT's answer is its output layer, which it calls its decoder.
    holds_blocks = isinstance(stack, nn.Module) and any(isinstance(m, nn.ModuleList) for m in stack.modules())
    return stack if holds_blocks else getattr(model, "base_model", model)  # type: ignore[return-value]


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


def architecture(model: nn.Module) -> Architecture | None:
    """The table's row for this model, or None."""
    return architectures.find(str(getattr(text_config(model), "model_type", "")))


def continues(model: nn.Module) -> bool:
    """Whether a pass over several tokens is known to go on from a cache; some recurrent layers take one at a time."""
    known = architecture(model)
    return known is not None and known.continues


def hidden_size(model: nn.Module) -> int:
    """The size of the residual stream."""
    return int(text_config(model).hidden_size)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order: the output of block i is layer i. Raises ModelError."""
    known = architecture(model)
    stack = decoder(model)
    if known is not None:
        return list(stack.get_submodule(known.blocks))  # type: ignore[call-overload]
    kind = getattr(text_config(model), "model_type", type(model).__name__)
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        refusal: str | None = f"it has {len(lists)} lists of {count} modules"
    elif stack in _PROVED:
        refusal = _PROVED[stack]
    else:
        refusal = _PROVED[stack] = stream_proof.refusal(stack, list(lists[0]), hidden_size(model))
    if refusal is None:
        return list(lists[0])
    raise ModelError(
        f"the architecture {kind!r} is unknown, and it can't be proved where its residual stream is: {refusal}",
        "use a model whose blocks return one residual stream; vectors/architectures/table.py lists those described",
    )


# The verdict for a decoder that no table knows, so that it is proved once, and not while other hooks are on it.
_PROVED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def recurrent_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that carry a recurrent state from token to token, by layer; {} for an unknown architecture."""
    known = architecture(model)
    types = getattr(text_config(model), "layer_types", None)
    if known is None or not known.recurrent or types is None:
        return {}
    return {
        i: block.get_submodule(known.recurrent[kind])
        for i, (block, kind) in enumerate(zip(blocks(model), types, strict=True))
        if kind in known.recurrent
    }
