"""The layers of a model's text decoder, apart from those of vision and audio towers and of multi-token prediction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from merges.inputs.heads import EMBEDDINGS

_LAYER = re.compile(r"(?P<before>(?:.*?\.)??(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)(?P<after>\..+)")
_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|image|audio|speech|mtp|nextn|draft|eagle|resampler|perceiver|projector|talker|code2wav)",
)
TEXTS = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "decoder")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def in_tower(name: str) -> bool:
    """Whether a name is that of a part beside the text decoder: a tower for images or sounds, or an extra head."""
    return bool(_TOWER.search(name))


class Decoder(NamedTuple):
    """Where the layers of the text decoder are: the names of their parameters begin with `prefix` and a number.

    Layers from `depth` on under the same prefix are those of multi-token prediction.
    """

    prefix: str  # "model.layers."; empty for a model without layers
    depth: int
    several: tuple[str, ...] = ()  # the prefixes of an encoder and a decoder, of which neither is the text's alone

    def split(self, name: str) -> tuple[int, str] | None:
        """The layer of a parameter, from 0, and what follows in its name; None outside of the prefix."""
        if not self.prefix or not name.startswith(self.prefix):
            return None
        index, _, after = name[len(self.prefix) :].partition(".")
        return (int(index), "." + after) if index.isdigit() and after else None

    def layer(self, name: str) -> int | None:
        """The layer that a parameter belongs to, from 0 to `depth` - 1; None for all others."""
        for prefix in self.several or (self.prefix,):
            position = self._replace(prefix=prefix).split(name)
            if position is not None and position[0] < self.depth:
                return position[0]
        return None


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the text decoder; nested ones are followed."""
    for key in TEXTS:
        inner = config.get(key)
        if isinstance(inner, dict) and (any(depth in inner for depth in DEPTHS) or text_settings(inner) is not inner):
            return text_settings(inner)
    return config


def decoder(config: Mapping[str, Any], names: Iterable[str]) -> Decoder:
    """Find the text decoder's layers, from the configuration and the names of the parameters.

    Of several stacks of layers, it is the one in the same module as the token embedding; else the longest that is not
    in a tower.
    """
    names = list(names)
    stacks: dict[str, set[int]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match:
            stacks.setdefault(match["before"], set()).add(int(match["index"]))
    if not stacks:
        return Decoder("", 0)
    beside = {name.rpartition(".")[0].rpartition(".")[0] for name in names if name.endswith(EMBEDDINGS)}
    plain = {prefix: indices for prefix, indices in stacks.items() if not in_tower(prefix)} or stacks
    nearby = {prefix: indices for prefix, indices in plain.items() if _parent(prefix) in beside}
    chosen = nearby or plain
    prefix = max(chosen, key=lambda prefix: (len(chosen[prefix]), prefix))
    long = sorted(prefix for prefix, indices in chosen.items() if len(indices) > 1)
    several = tuple(long) if len(long) > 1 else ()
    stored = max(max(stacks[prefix]) for prefix in several or (prefix,)) + 1
    settings = text_settings(config)
    depth = next((settings[key] for key in DEPTHS if isinstance(settings.get(key), int)), stored)
    depth = stored if several else depth
    return Decoder(prefix, min(depth, stored) if depth > 0 else stored, several)


def _parent(prefix: str) -> str:
    """What holds a stack of layers: "model" for "model.layers."."""
    return prefix.rstrip(".").rpartition(".")[0]


def other_stacks(decoder_: Decoder, names: Iterable[str]) -> list[str]:
    """The prefixes of the stacks outside the text decoder, and its layers from `depth` on, with their index; sorted."""
    prefixes = set()
    for name in names:
        if decoder_.several and name.startswith(decoder_.several):
            continue
        position = decoder_.split(name)
        if position is not None:
            if position[0] >= decoder_.depth:
                prefixes.add(f"{decoder_.prefix}{position[0]}")
            continue
        match = _LAYER.fullmatch(name)
        if match:
            prefixes.add(match["before"].rstrip("."))
    return sorted(prefixes)
