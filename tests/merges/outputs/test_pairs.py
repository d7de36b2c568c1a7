"""A base and its fine-tuned model belong together by their settings and tokens, and what is left out is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folders
import pytest
import torch

from merges import api
from merges.outputs import adapter
from vectors.errors import ModelError
from vectors.events import Event

MASKS = {f"model.layers.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(3)}


def test_settings_that_differ_are_refused_with_both_values_unless_allowed(here: Path) -> None:
    folders.write(
        here / "other", folders.tuned(folders.weights(0), 1), config={"hidden_act": "gelu", "rms_norm_eps": 0.1}
    )
    for write in (
        lambda *allowed: api.diff("base", "other", "v.safetensors", allow_config=allowed),
        lambda *allowed: adapter.from_models("base", "other", Path("lora"), 2, allow_config=allowed),
    ):
        with pytest.raises(ModelError) as caught:
            write()
        assert any(p == "hidden_act is absent in base, 'gelu' in other" for p in caught.value.problems)
        assert any("rms_norm_eps is" in p for p in caught.value.problems)
        assert "--allow-config" in caught.value.hint
        with pytest.raises(ModelError, match="rms_norm_eps"):
            write("hidden_act")
        write("hidden_act", "rms_norm_eps")


def test_tokens_with_other_ids_are_refused_unless_allowed(here: Path) -> None:
    folders.write(here / "other", folders.tuned(folders.weights(0), 1), tokenizer=True)
    folders.exchange_two_tokens(here / "other")
    with pytest.raises(ModelError, match="vocabularies differ") as caught:
        api.diff("base", "other", "v.safetensors")
    assert "--allow-config vocabulary" in caught.value.hint
    api.diff("base", "other", "v.safetensors", allow_config=["vocabulary"])


def test_tokens_that_take_rows_without_a_token_are_noted(here: Path) -> None:
    """As fine-tunes do that use spare rows of the embedding for the turns of a chat."""
    folders.write(here / "other", folders.tuned(folders.weights(0), 1), tokenizer=True)
    path = here / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    del content["model"]["vocab"][last]
    path.write_text(json.dumps(content))
    notes: list[str] = []
    api.diff("base", "other", "v.safetensors", on_event=lambda event: notes.append(event.message))
    assert any(f"only other has {last!r}" in note for note in notes if note)


def test_tensors_that_are_left_out_are_named(here: Path) -> None:
    folders.write(here / "old", folders.weights(0, "F32") | MASKS)
    folders.write(here / "new", folders.weights(1, "F32"))
    notes: list[str] = []

    def listen(event: Event) -> None:
        notes.extend([event.message] if event.message else [])

    for write in (
        lambda: api.diff("old", "new", "v.safetensors", on_event=listen),
        lambda: adapter.from_models("new", "old", Path("lora"), 2, on_event=listen),
    ):
        notes.clear()
        write()
        assert any("model.layers.0.attn.bias" in n and "old are left out: models compute them" in n for n in notes)


def test_integers_that_differ_are_no_part_of_a_vector(here: Path) -> None:
    """They were dropped without a word where the result is a vector or an adapter."""
    for name, value in (("x", 1), ("y", 2)):
        folders.write(here / name, folders.weights(value) | {"model.ids": torch.full((3,), value)})
    with pytest.raises(ModelError, match=r"model.ids is I64, not floating-point, and differs"):
        api.merge(folders.recipe("y", base="x", method="task_arithmetic", as_="vector"), "v.safetensors")
    with pytest.raises(ModelError, match=r"model.ids is I64, not floating-point, and differs"):
        api.diff("x", "y", "v.safetensors")


def test_gpt2_as_on_the_hub_and_as_saved_are_one_model(here: Path) -> None:
    """The files on the hub have h.0..., those that transformers saves transformer.h.0..."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=1)
    for seed, name in enumerate(("saved", "tuned")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(name)
    shutil.copytree("saved", "hub")
    tensors = load_file("saved/model.safetensors")
    save_file(
        {n.removeprefix("transformer."): t for n, t in tensors.items()}, "hub/model.safetensors", {"format": "pt"}
    )
    api.merge(folders.recipe("hub", "tuned", base=None, method="linear"), "mixed")
    api.merge(folders.recipe("saved", "tuned", base=None, method="linear"), "plain")
    mixed, plain = (
        {n.removeprefix("transformer."): t for n, t in load_file(f"{out}/model.safetensors").items()}
        for out in ("mixed", "plain")
    )
    assert mixed.keys() == plain.keys()
    assert all(torch.equal(mixed[name], plain[name]) for name in mixed)
    vector = api.diff("hub", "tuned", "v.safetensors")
    assert len(vector.parameters) + len(vector.unchanged) == len(tensors)
