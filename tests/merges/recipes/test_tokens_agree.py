"""A row of an embedding belongs to a token: where ids differ, rows are matched by token, or the merge is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch

from merges import api
from merges.recipes.agreement.tokenizers import tokens_of
from merges.recipes.document import parse
from merges.recipes.plan import plan
from vectors.errors import ModelError

TOKENS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d"]


def model(folder: Path, tokens: list[str], *, rows: int | None = None, seed: int = 0, **files: Any) -> None:
    """A model whose row i is constant and says its token; `files` are others of its tokenizer, by their stem."""
    weights = folders.weights(seed, "F32")
    values = torch.tensor(
        [float(sum(map(ord, token))) for token in tokens] + [0.0] * ((rows or len(tokens)) - len(tokens))
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = values[:, None].repeat(1, 8).contiguous()
    folders.write(folder, weights, config={"vocab_size": len(values)})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [plain | {"id": i, "content": token} for i, token in enumerate(tokens) if token.startswith("<")]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.pop("tokenizer_config", {})
    for stem, value in ({"tokenizer": content, "tokenizer_config": config} | files).items():
        (folder / f"{stem}.json").write_text(json.dumps(value))


def linear(*names: str, **more: Any) -> dict[str, Any]:
    return {"method": "linear", "base": names[0], "models": [{"model": name} for name in names]} | more


def rows_of(folder: Path) -> list[float]:
    return [round(float(value)) for value in folders.read(folder)["model.embed_tokens.weight"][:, 0]]


SWAPPED = [*TOKENS[:3], "b", "a", *TOKENS[5:]]


def test_swapped_ids_are_refused_or_matched_by_token(here: Path) -> None:
    model(here / "x", TOKENS)
    model(here / "y", SWAPPED)
    with pytest.raises(ModelError) as caught:
        plan(parse(linear("x", "y")))
    assert "vocabularies differ: 'a' is 3 in x, 4 in y; 'b' is 4 in x, 3 in y" in caught.value.problems[0]
    assert "--tokenizer base" in caught.value.hint
    api.merge(parse(linear("x", "y", tokenizer={"source": "base"})), "out")
    assert rows_of(here / "out") == rows_of(here / "x")
    made = plan(parse(linear("x", "y", allow_config=["vocabulary"])))
    assert any("rows are merged by their position, as allowed" in note for note in made.notes)


EXTRA = {"added_tokens_decoder": {"7": {"content": "<new>", "special": True}}}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": EXTRA},
        {"added_tokens": {"<new>": 7}},
        {"tokenizer_config": {"pad_token": "<new>"}},
        {"tokenizer_config": {"additional_special_tokens": ["<new>"]}},
    ],
)
def test_tokens_that_only_other_files_add_count_too(here: Path, files: dict[str, Any]) -> None:
    model(here / "x", TOKENS, rows=8)
    model(here / "y", TOKENS, rows=8, **files)
    with pytest.raises(ModelError, match="vocabularies differ: only y has '<new>'"):
        plan(parse(linear("x", "y")))
    found = tokens_of(here / "y")
    assert found is not None
    assert found.ids["<new>"] == 7
    api.merge(parse(linear("x", "y", tokenizer={"source": "union"})), "out")
    written = tokens_of(here / "out")
    assert written is not None
    assert written.ids == found.ids
    assert len(rows_of(here / "out")) == 8


def test_tokens_are_those_that_transformers_loads(here: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for number, files in enumerate(
        ({}, {"tokenizer_config": EXTRA}, {"tokenizer_config": {"pad_token": "<new>", "eos_token": "</s>"}})
    ):
        model(here / f"m{number}", TOKENS, **files)
        found = tokens_of(here / f"m{number}")
        assert found is not None
        assert found.ids == PreTrainedTokenizerFast.from_pretrained(here / f"m{number}").get_vocab()


def test_no_id_of_the_written_tokenizer_lies_beyond_the_rows(here: Path) -> None:
    for name in ("x", "y"):
        model(here / name, TOKENS, tokenizer_config=EXTRA)
    with pytest.raises(ModelError, match=r"the tokenizer of x has ids up to 7 \('<new>'\), its embedding 7 rows"):
        plan(parse(linear("x", "y")))
    api.merge(parse(linear("x", "y", tokenizer={"source": "base"})), "out")
    assert len(rows_of(here / "out")) == 8
    written = tokens_of(here / "out")
    assert written is not None
    assert max(written.ids.values()) < 8
    assert "<new>" in written.stored


def test_a_placeholder_for_images_needs_no_row_in_a_model_of_text(here: Path) -> None:
    added = {"added_tokens_decoder": {"7": {"content": "<image_soft_token>", "special": True}}}
    for name in ("x", "y"):
        model(here / name, TOKENS, tokenizer_config=added)
    made = plan(parse(linear("x", "y")))
    assert any("has ids up to 7 ('<image_soft_token>'), its embedding 7 rows" in note for note in made.notes)
    for name in ("x", "y"):
        config = json.loads((here / name / "config.json").read_text())
        (here / name / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 8}}))
    with pytest.raises(ModelError, match="has ids up to 7"):
        plan(parse(linear("x", "y")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"\x0a\x05\x15\x00\x00\x00\x00"),  # a piece without its text
        ("vocab.json", b'{"a": "x"}'),
        ("vocab.json", b'{"a": 0.5}'),
        ("vocab.json", b'{"a": -1}'),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(here: Path, name: str, content: bytes) -> None:
    for folder in ("x", "y"):
        model(here / folder, TOKENS)
    (here / "x" / "tokenizer.json").unlink()
    (here / "x" / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"the tokenizer of .*x can't be read"):
        plan(parse(linear("x", "y")))


def test_rows_without_a_token_are_kept_or_cut_and_named(here: Path) -> None:
    for name in ("x", "y"):
        model(here / name, TOKENS, rows=16)
    kept = plan(parse(linear("x", "y")))
    assert any("the last 9 row(s) of the embedding have no token in x; they are kept" in n for n in kept.notes)
    cut = plan(parse(linear("x", "y", tokenizer={"source": "base"})))
    assert any("the result has 7 rows; the last 9 of x are cut" in note for note in cut.notes)
    padded = plan(parse(linear("x", "y", tokenizer={"source": "base", "pad_to_multiple_of": 16})))
    assert not any("cut" in note for note in padded.notes)


def test_another_end_token_and_a_missing_tokenizer_are_noted(here: Path) -> None:
    model(here / "x", TOKENS, tokenizer_config={"eos_token": "</s>"})
    model(here / "y", TOKENS, tokenizer_config={"eos_token": {"content": "<s>"}})
    model(here / "z", TOKENS)
    for path in (here / "z").glob("tokenizer*"):
        path.unlink()
    notes = plan(parse(linear("x", "y", "z"))).notes
    assert "the eos token is '<s>' in y; the result has that of x, '</s>'" in notes
    assert any(note.startswith("no tokenizer in z: its embedding's rows are taken") for note in notes)


def test_other_kinds_of_tokenizer_are_compared_by_their_files(here: Path) -> None:
    def sentencepiece(tokens: list[str]) -> bytes:
        pieces = [bytes([0x0A, len(t)]) + t.encode() + bytes([0x15, 0, 0, 0, 0]) for t in tokens]
        return b"".join(bytes([0x0A, len(piece)]) + piece for piece in pieces) + bytes([0x12, 2, 0x18, 3])

    writers = {
        "tokenizer.model": sentencepiece,
        "vocab.txt": lambda tokens: "\n".join(tokens).encode(),
        "vocab.json": lambda tokens: json.dumps({t: i for i, t in enumerate(tokens)}).encode(),
        "qwen.tiktoken": lambda tokens: b"".join(b"%s %d\n" % (__import__("base64").b64encode(t.encode()), i)
                                                 for i, t in enumerate(tokens)),
    }  # fmt: skip
    for name, write in writers.items():
        stem = name.replace(".", "-")
        for end, tokens in (("x", TOKENS), ("y", SWAPPED), ("same", TOKENS)):
            model(here / f"{stem}-{end}", TOKENS)
            (here / f"{stem}-{end}" / "tokenizer.json").unlink()
            (here / f"{stem}-{end}" / name).write_bytes(write(tokens))
        plan(parse(linear(f"{stem}-x", f"{stem}-same")))
        with pytest.raises(ModelError, match="vocabularies differ"):
            plan(parse(linear(f"{stem}-x", f"{stem}-y")))
    (here / "vocab-txt-y" / "tokenizer.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"vocab-txt-y.*tokenizer.json is damaged"):
        plan(parse(linear("vocab-txt-x", "vocab-txt-y")))


def test_tokenizers_count_in_the_digest_of_a_plan(here: Path) -> None:
    digests = set()
    for name, config in (("x", {}), ("y", {"model_max_length": 5})):
        model(here / name, TOKENS, tokenizer_config=config)
        planned = plan(parse({"method": "passthrough", "models": [{"model": name}]}))
        digests.add(planned.digest)
        assert planned.digest != planned.former_digest
    assert len(digests) == 2


def test_a_record_from_before_tokenizers_counted_is_still_verified(here: Path) -> None:
    model(here / "x", TOKENS)
    document = parse({"method": "passthrough", "models": [{"model": str(here / "x")}]})
    api.merge(document, "out")
    record = json.loads((here / "out" / "run.json").read_text())
    record["details"]["plan"] = plan(document).former_digest
    (here / "out" / "run.json").write_text(json.dumps(record))
    api.verify("out")
