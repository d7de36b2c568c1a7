"""Folders of models and adapters as parts: stored as exact differences, the same bytes anywhere, built, sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pico
import pytest
import torch
from personalities import commit
from safetensors.torch import load_file, save_file

from merges import api
from merges.recipes.recipe import Part, Recipe
from steer.store import creation, names
from steer.store.layout import Store
from steer.store.objects.model import TASK, WEIGHT, read_commit, read_composition, read_manifest
from steer.store.using.realise import problems_of_build
from steer.store.verify import verify
from steer.store.working import document, folder

ADAPTED = "model.layers.1.self_attn.q_proj"


pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico.save(tmp_path / "base", "llama", seed=1)


@pytest.fixture
def store(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("STEER_HOME", raising=False)
    return store_of(tmp_path / "work", base, monkeypatch)


def store_of(work: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    work.mkdir()
    monkeypatch.chdir(work)
    made = creation.create(work, "tone")
    document.write(made.file, document.NEW.format(base=base))
    return made


def tuned(base: Path, to: Path) -> Path:
    """The base with another final norm and another query projection."""
    shutil.copytree(base, to)
    weights = load_file(to / "model.safetensors")
    for name in (f"{ADAPTED}.weight", "model.norm.weight"):
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3))
        weights[name] = (weights[name] + 0.05 * noise).to(weights[name].dtype)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def adapter(base: Path, to: Path) -> Path:
    """A LoRA adapter of the query projection, of rank 2."""
    rows, columns = load_file(base / "model.safetensors")[f"{ADAPTED}.weight"].shape
    draw = torch.Generator().manual_seed(4)
    to.mkdir()
    tensors = {
        f"base_model.model.{ADAPTED}.lora_A.weight": torch.randn(2, columns, generator=draw),
        f"base_model.model.{ADAPTED}.lora_B.weight": torch.randn(rows, 2, generator=draw),
    }
    save_file(tensors, to / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": None}
    (to / "adapter_config.json").write_text(json.dumps(settings))
    return to


def test_a_model_is_a_part_that_gives_its_weights_again_to_the_bit(store, base, tmp_path, steer):
    model = tuned(base, tmp_path / "poet")
    code, text, err = steer("add", str(model))
    assert code == 0, err
    assert "added poet" in text
    assert steer("commit", "-m", "Poet")[0] == 0
    (part,) = read_composition(store, read_commit(store, names.resolve(store, "HEAD")).composition).parts
    assert (part.kind, part.strength) == (TASK, 1.0)
    layers = read_manifest(store, names.resolve(store, "HEAD"))["layers"]
    assert part.digest in [layer["digest"] for layer in layers if layer["mediaType"] == WEIGHT]
    assert steer("build", "HEAD", "-o", "built")[0] == 0
    made, expected = load_file("built/model.safetensors"), load_file(model / "model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert problems_of_build(store, names.resolve(store, "HEAD"), Path("built")) == []
    assert verify(store).problems == ()


def test_an_adapter_is_a_part_that_gives_what_a_merge_gives(store, base, tmp_path, steer):
    lora = adapter(base, tmp_path / "lora")
    assert steer("add", str(lora), "--strength", "0.5")[0] == 0
    steer("commit", "-m", "Half of the adapter")
    assert steer("build", "HEAD", "-o", "built")[0] == 0
    recipe = Recipe("task_arithmetic", (Part(str(lora), "half", {"weight": 0.5}),), str(base))
    api.merge(recipe, Path("merged"))
    made, expected = load_file("built/model.safetensors"), load_file("merged/model.safetensors")
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    before = load_file(base / "model.safetensors")
    assert [name for name in made if not torch.equal(made[name], before[name])] == [f"{ADAPTED}.weight"]


def test_the_same_weights_are_the_same_part_anywhere(store, base, tmp_path, monkeypatch):
    def digests(work: Store, model: Path, lora: Path) -> list[str | None]:
        folder.add(work, model, "poet", {})
        folder.add(work, lora, "lora", {})
        return [entry.digest for entry in document.read(work.file).parts]

    first = digests(store, tuned(base, tmp_path / "poet"), adapter(base, tmp_path / "lora"))
    other = store_of(tmp_path / "elsewhere", base, monkeypatch)
    assert digests(other, tuned(base, tmp_path / "renamed"), adapter(base, tmp_path / "moved")) == first
    assert not list(store.root.glob("*conversion*"))


def test_parts_of_weights_are_sent_and_arrive_without_their_folders(store, base, tmp_path, steer, monkeypatch):
    model = tuned(base, tmp_path / "poet")
    steer("add", str(model))
    steer("commit", "-m", "Poet")
    shutil.rmtree(model)
    assert steer("push", str(tmp_path / "remote"))[0] == 0
    other = store_of(tmp_path / "elsewhere", base, monkeypatch)
    other.file.unlink()
    code, _, err = steer("pull", str(tmp_path / "remote"), "tone")
    assert code == 0, err
    code, _, err = steer("build", "tone", "-o", "built")
    assert code == 0, err
    assert "norm" in " ".join(load_file("built/model.safetensors"))


def test_a_folder_that_is_no_difference_from_the_base_is_refused_with_the_reason(store, base, tmp_path, steer):
    before = store.file.read_text()
    (tmp_path / "empty").mkdir()
    code, _, err = steer("add", str(tmp_path / "empty"))
    assert (code, "neither a model's folder" in err) == (2, True)
    other = pico.save(tmp_path / "gpt2", "gpt2", seed=1)
    code, _, err = steer("add", str(other))
    assert code in (1, 2)
    assert f"can't be a part over the base {base}" in err
    code, _, err = steer("add", str(tuned(base, tmp_path / "poet")), "--layers", "2", "--scope", "response")
    assert code == 2
    assert "has no layers" in err
    assert "has no scope" in err
    assert store.file.read_text() == before


def test_bisect_evaluates_versions_that_change_the_weights(store, base, tmp_path, steer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    token = tokenizer("warm", add_special_tokens=False).input_ids[0]
    folder = shutil.copytree(base, tmp_path / "poet")
    weights = load_file(folder / "model.safetensors")
    row = weights["lm_head.weight"][token]
    row += 0.5 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert steer("add", folder)[0] == 0
    pairs = [{"kind": "pair", "prompt": f"the {i}", "positive": "warm", "negative": "cold"} for i in range(40)]
    (store.work / "warm.yaml").write_text(json.dumps({"name": "warm", "items": pairs}))
    strengths = [1.0, 1.1, 1.2, 0.1, 0.2]
    made = [commit(store, f"Step {i}", poet=strength) for i, strength in enumerate(strengths)]
    code, text, err = steer("bisect", "--eval", "warm.yaml", "--good", made[0][7:19], "--json")
    assert code == 0, err
    value = json.loads(text)
    assert (value["broken"], value["last_good"]) == (made[3], made[2])
    assert steer("bisect", "--eval", "warm.yaml", "--good", made[0][7:19])[1].startswith(made[3][7:15])
    assert not list((store.root).glob("*bisected*"))
