"""Where a checkpoint writes to its residual stream: the table's row, with the names of this checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from merges.inputs.decoder import in_tower, text_settings
from vectors import architectures
from vectors.architectures import Checkpoint


def checkpoint(config: Mapping[str, Any], names: Collection[str]) -> Checkpoint | str:
    """The description of a model by its configuration and its parameters' names, or why there is none.

    The decoder may lie anywhere: below `model.`, at the top as in the hub's GPT-2, or inside a vision-language model.
    """
    text = text_settings(config)
    kinds = [str(part["model_type"]) for part in (text, config) if part.get("model_type")]
    known = next((row for row in map(architectures.find, kinds) if row is not None), None)
    if known is None:
        return f"it is not known where {kinds[0] if kinds else 'a model without a type'} writes to its residual stream"
    if isinstance(known.checkpoint, str):
        return f"{kinds[0]} can't be folded: {known.checkpoint}"
    for setting, reason in known.checkpoint.unless.items():
        if text.get(setting):
            return f"this {kinds[0]} can't be folded: {reason} ({setting})"
    first, block = known.checkpoint.embeddings[0], known.checkpoint.block.format(i=0)
    prefixes = [
        name.removesuffix(first)
        for name in names
        if (name == first or name.endswith(f".{first}")) and not in_tower(name)
    ]
    prefixes = [prefix for prefix in prefixes if any(name.startswith(prefix + block) for name in names)]
    if len(prefixes) != 1:
        return f"the checkpoint has {len(prefixes)} decoders with {first} and {block}, not one"
    found = known.checkpoint.below(prefixes[0])
    return found.inside(str(config["model_type"])) if config.get("model_type") in known.wrappers else found


def writers(described: Checkpoint, names: Iterable[str], layers: range) -> dict[str, str | None]:
    """The parameters that write to the residual stream, in the embeddings and in the blocks `layers`.

    Each has the name of the norm between its output and the stream, or None.
    """
    result: dict[str, str | None] = {name: None for name in names if name in described.embeddings}
    prefix, _, rest = described.block.partition("{i}")
    for name in names:
        match = re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(rest)}(.+)", name)
        if match is None or int(match[1]) not in layers:
            continue
        for part, patterns in described.writers.items():
            if any(re.fullmatch(pattern, match[2]) for pattern in patterns):
                norm = described.norms.get(part)
                result[name] = f"{prefix}{match[1]}{rest}{norm}" if norm else None
    return result


def stream_is_last(described: Checkpoint, name: str) -> bool:
    """Whether the stream is the last dimension of a writing tensor: of embeddings, of biases, and where it says so."""
    inside = re.sub(rf"^{re.escape(described.block).replace(re.escape('{i}'), '[0-9]+')}", "", name)
    return name in described.embeddings or any(re.fullmatch(pattern, inside) for pattern in described.columns)
