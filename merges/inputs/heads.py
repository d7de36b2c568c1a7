"""The embedding and the output head of a model: which parameters they are, and whether they are one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merges.inputs.defaults import ties_by_default
from vectors.errors import ModelError
from vectors.weights import Entry, mapped

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
_HEAD = re.compile(
    r"(?:(?:model|language_model|text_model|llm|thinker|transformer)\.)*(?:lm_head|output|embed_out)\.weight"
)
_SAMPLES, _SAMPLE = 16, 2048  # how many samples of a tensor are compared, and the bytes of each


def is_head(name: str) -> bool:
    """Whether a parameter of this name is an output head."""
    return bool(_HEAD.fullmatch(name))


def head_of(entries: Iterable[str]) -> str | None:
    """The parameter that is the output head; None where there is none."""
    heads = [name for name in entries if is_head(name)]
    return heads[0] if len(heads) == 1 else None


def embedding_of(entries: Iterable[str]) -> str | None:
    """The parameter that embeds tokens; None where there is none or several."""
    embeddings = [name for name in entries if name.endswith(EMBEDDINGS)]
    return embeddings[0] if len(embeddings) == 1 else None


def is_tied(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """Whether the head is the embedding: as the configuration says, or as its class says where it does not.

    A model that stores no head, and whose configuration has no `tie_word_embeddings`, is tied
    if it has an embedding.
    """
    texts = config.get("text_config")
    for settings in (config, texts if isinstance(texts, dict) else {}):
        if "tie_word_embeddings" in settings:
            return bool(settings["tie_word_embeddings"])
    if head_of(entries) is None:
        return embedding_of(entries) is not None
    return ties_by_default(folder)


def without_tied_head(reference: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The parameters of a model with a tied head without that head, which some files store again.

    Raises ModelError where the stored head is not the embedding.
    """
    head, embedding = head_of(entries), embedding_of(entries)
    if head is None or embedding is None:
        return dict(entries)
    if not _alike(entries[head], entries[embedding]):
        raise ModelError(
            f"{reference} stores {head}, which differs from {embedding}, though its configuration says that they are "
            "one tensor",
            f"if its head counts, set tie_word_embeddings to false in its config.json; if not, leave {head} out",
        )
    return {name: entry for name, entry in entries.items() if name != head}


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two tensors are the same by shape, dtype and samples of their bytes, so that no tensor is read whole."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    first, second = (mapped(entry).view(np.uint8) for entry in (a, b))
    offsets = np.linspace(0, max(len(first) - _SAMPLE, 0), _SAMPLES, dtype=np.int64)
    return all(np.array_equal(first[p : p + _SAMPLE], second[p : p + _SAMPLE]) for p in offsets)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head has become a tensor of its own."""
    changed = {**config, "tie_word_embeddings": False}
    text = changed.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed
