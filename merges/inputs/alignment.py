"""Inputs brought to the names and the head of the model that they are merged into, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merges.inputs import heads, names
from merges.inputs.sources import Source
from vectors.errors import shortened
from vectors.weights import Entry

# What older versions of transformers stored though the model computes it, and no version loads: the frequencies of
# rotary embeddings, and the causal mask of GPT-2, GPT-J, GPT-Neo and GPT-NeoX.
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(?P<mask>bias|masked_bias))")


def align(sources: Sequence[Source], main: Source) -> list[str]:
    """Give each model the parameter names of `main`: those of another generation of transformers, and its head.

    A head that one model has and another ties to its embedding is, for the latter, its embedding: then the result has
    a head of its own. Returns notes for the user.
    """
    notes = []
    models = [source for source in sources if source.kind == "model"]
    for source in models:
        _rename(source, main)
    notes += _without_computed([*models, main])
    stored = {name for source in models for name in source.entries if heads.is_head(name)}
    stored |= {name for s in sources if s.vector is not None for name in s.vector.parameters if heads.is_head(name)}
    for head in stored:
        for source in {id(s): s for s in [*models, main]}.values():
            embedding = heads.embedding_of(source.entries)
            if source.tied and embedding is not None and head not in source.entries:
                source.entries = {**source.entries, head: source.entries[embedding]}
                notes.append(f"the head of {source.reference} is its embedding; the result has a head of its own")
    return list(dict.fromkeys(notes))


def _without_computed(models: Sequence[Source]) -> list[str]:
    """Leave out tensors that a model computes, where some of the models store them and others do not."""
    notes = []
    common = set.intersection(*(set(source.entries) for source in models))
    for source in models:
        computed = {name for name in source.entries.keys() - common if _is_computed(name, source.entries[name])}
        if computed:
            source.entries = {name: entry for name, entry in source.entries.items() if name not in computed}
            listed = shortened(sorted(computed))
            notes.append(f"{listed} of {source.reference} are left out: models compute them when they load")
    return notes


def _is_computed(name: str, entry: Entry) -> bool:
    match = _COMPUTED.fullmatch(name)
    # A causal mask is [1, 1, positions, positions], and the value for what it hides is a single number.
    return match is not None and (match["mask"] is None or len(entry.shape) in (0, 4))


def _rename(source: Source, main: Source) -> None:
    lacking = set(main.entries) - set(source.entries)
    extra = set(source.entries) - set(main.entries)
    if source is main or not lacking or not extra:
        return
    theirs, ours = (names.skeleton(s.path, str((s.config.get("architectures") or [""])[0])) for s in (source, main))
    matches = names.matched(extra, theirs, lacking, ours)
    if matches:
        source.take_names({old: new for new, old in matches.items()})
