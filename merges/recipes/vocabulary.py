"""A common vocabulary for models with different tokenizers, and the source of each token's embedding rows.

    tokenizer:
      source: union                       # or base, or one of the models
      pad_to_multiple_of: 64
      tokens:
        "<|im_start|>": {source: org/chat}                  # the row of that model, for every input; or zero
        "<|end|>": {source: org/chat, token: "<|im_end|>"}  # the row of another of its tokens, by text or id
        "<|pad|>": {source: zero, force: false}             # only for inputs that lack the token

A token that a model lacks takes the row of the base; if the base lacks it too, the mean of the rows of all models that
have it. Ids of the first tokenizer stay as they are and new tokens follow; rows that pad the vocabulary are the mean of
all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from merges.engine.readers import Array, Mean, Reader, Rows
from merges.inputs.heads import HEADS, embedding_of
from merges.inputs.sources import Source
from merges.recipes.agreement.tokenizers import TOKENIZER_VALUES, Tokens, tokens_of
from merges.recipes.recipe import Tokenizer
from vectors.documents import json_text
from vectors.errors import ModelError

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", *HEADS)


class Choice(NamedTuple):
    """The source of a token's row: a model or `zero`; with `force` for all inputs, else for those that lack it."""

    reference: str
    row: int
    force: bool


@dataclass(eq=False)
class Union:
    """A common vocabulary: `tokens` in the order of their ids; `parameters` are those with one row per token."""

    tokens: tuple[str, ...]
    parameters: frozenset[str]
    main: Source  # the model whose tokenizer the result takes, with the new tokens added
    added: dict[str, dict[str, Any]]  # the new tokens, as tokenizer.json writes added tokens
    ids: dict[str, dict[str, int]]  # of the tokens in each model, by its reference
    models: tuple[Source, ...]  # the first is the base, from which missing tokens are taken
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    multiple: int = 1  # the number of rows is a multiple of this

    @property
    def size(self) -> int:
        """The number of rows of the embedding, with padding."""
        return -(-len(self.tokens) // self.multiple) * self.multiple

    def notes(self, main: Source) -> list[str]:
        """A note where rows of `main` that have no token are cut."""
        embedding = embedding_of(main.entries)
        rows = main.entries[embedding].shape[0] if embedding is not None else self.size
        if self.size < rows:
            return [
                f"the result has {self.size} rows; the last {rows - self.size} of {main.reference} are cut, since no "
                "token has them (tokenizer: pad_to_multiple_of adds some)"
            ]
        return []

    def reader(self, name: str, source: Source, reader: Reader, is_delta: bool) -> Reader:
        """A reader for the parameter in `source` with its rows in the order of the common vocabulary, padded."""
        rows, count = self._rows(name, source, reader, is_delta), len(self.tokens)
        if self.size == count:
            return rows
        positions = np.arange(self.size)
        return Rows([rows, Mean(rows)], (positions >= count).astype(int), np.where(positions < count, positions, 0))

    def _rows(self, name: str, source: Source, reader: Reader, is_delta: bool) -> Reader:
        if is_delta:
            base_ids = self.ids[self.models[0].reference]
            rows = np.array([base_ids.get(token, -1) for token in self.tokens])
            rows[rows >= reader.shape[0]] = -1
            return Rows([reader], np.where(rows < 0, -1, 0), rows)
        holders = {model.reference: model.reader(name, ())[0] for model in self.models if name in model.entries}
        readers: list[Reader] = [reader, *holders.values()]
        reader_of = {reference: i + 1 for i, reference in enumerate(holders)}
        reader_of_row, rows = np.full(len(self.tokens), -1), np.zeros(len(self.tokens), np.int64)
        means: list[np.ndarray] = []
        for i, token in enumerate(self.tokens):
            chosen = self.chosen.get(token)
            row_by_model = {
                ref: self.ids[ref][token]
                for ref in holders
                if self.ids[ref].get(token, 1 << 60) < holders[ref].shape[0]
            }
            first = self.models[0].reference
            if chosen is not None and (chosen.force or source.reference not in row_by_model):
                if chosen.reference in reader_of and chosen.row < holders[chosen.reference].shape[0]:
                    reader_of_row[i], rows[i] = reader_of[chosen.reference], chosen.row
            elif source.reference in row_by_model:
                reader_of_row[i], rows[i] = 0, row_by_model[source.reference]
            elif first in row_by_model:
                reader_of_row[i], rows[i] = reader_of[first], row_by_model[first]
            elif len(row_by_model) == 1:
                reference = next(iter(row_by_model))
                reader_of_row[i], rows[i] = reader_of[reference], row_by_model[reference]
            elif row_by_model:
                reader_of_row[i], rows[i] = len(readers), len(means)
                means.append(np.mean([_row(holders[ref], row) for ref, row in sorted(row_by_model.items())], 0))
        if means:
            readers.append(Array(np.stack(means).astype(np.float32)))
        return Rows(readers, reader_of_row, rows)


def _row(reader: Reader, row: int) -> np.ndarray:
    width = reader.shape[1]
    out = np.empty(width, np.float32)
    reader.read(row * width, (row + 1) * width, out)
    return out.astype(np.float64)


def union(request: Tokenizer, main: Source, models: Sequence[Source]) -> Union:
    """The common vocabulary that a recipe requests. Raises ModelError with every problem."""
    problems: list[str] = []
    distinct = list({model.reference: model for model in models}.values())
    tokenizers: dict[str, Tokens] = {}
    for model in distinct:
        try:
            tokens = tokens_of(model.path)
        except ModelError as error:
            problems += error.problems
            continue
        if tokens is None:
            problems.append(f"{model.reference} has no tokenizer, so that its rows can't be matched by token")
        else:
            tokenizers[model.reference] = tokens
    wanted = request.source
    owner = main if wanted in ("union", "base") else next((m for m in distinct if m.reference == wanted), None)
    if owner is None:
        problems.append(f"tokenizer.source is {wanted!r}, not union, base or one of the models")
    chosen = {}
    for token, entry in request.tokens.items():
        reference, other = entry.source, token if entry.token is None else entry.token
        token_ids, row = tokenizers[reference].ids if reference in tokenizers else {}, 0
        if not any(token in tokens.ids for tokens in tokenizers.values()):
            problems.append(f"no model has the token {token!r}")
        elif reference != "zero" and reference not in tokenizers:
            problems.append(f"the source of the token {token!r} is {reference!r}, which is not among the models")
        elif reference != "zero" and other not in (token_ids.values() if isinstance(other, int) else token_ids):
            problems.append(f"the source of the token {token!r} is {other!r} of {reference}, which has no such token")
        elif reference != "zero":
            row = other if isinstance(other, int) else token_ids[other]
        chosen[token] = Choice(reference, row, entry.force is not False)
    if owner is not None and owner.reference in tokenizers and not (owner.path / "tokenizer.json").is_file():
        problems.append(f"{owner.reference} has no tokenizer.json, to which the tokens of others could be added")
    if problems or owner is None:
        raise ModelError(problems, "see docs/merge.md on tokenizers")
    ids = {reference: tokens.ids for reference, tokens in tokenizers.items()}
    ordered = sorted(ids[owner.reference], key=ids[owner.reference].__getitem__)
    if [ids[owner.reference][token] for token in ordered] != list(range(len(ordered))):
        raise ModelError(
            f"the tokenizer of {owner.reference} has gaps between its ids", "use another as tokenizer.source"
        )
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    owner_tokens = tokenizers[owner.reference]
    added: dict[str, dict[str, Any]] = {
        token: {**plain, **owner_tokens.details.get(token, {}), "id": owner_tokens.ids[token], "content": token}
        for token in ordered
        if token not in owner_tokens.stored  # so that it keeps its id beside new ones
    }
    if wanted == "union":
        for tokens in tokenizers.values():
            for token in sorted(tokens.ids, key=tokens.ids.__getitem__):
                if token not in owner_tokens.ids and token not in added:
                    added[token] = {
                        **plain, **tokens.details.get(token, {}), "id": len(ordered), "content": token
                    }  # fmt: skip
                    ordered.append(token)
    parameters = frozenset(name for name in main.entries if name.endswith(EMBEDDINGS))
    multiple = request.pad_to_multiple_of or 1
    return Union(tuple(ordered), parameters, owner, added, ids, tuple(distinct), chosen, multiple)


def write(vocabulary: Union, content: bytes) -> bytes:
    """The tokenizer.json of the result: `content`, that of the main model, with the new tokens added."""
    tokenizer = json_text.parse(content, values=TOKENIZER_VALUES)
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *vocabulary.added.values()]
    return json.dumps(tokenizer, ensure_ascii=False, indent=2).encode()
