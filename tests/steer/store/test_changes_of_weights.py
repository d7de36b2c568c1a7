"""Fine-tuned models and adapters as parts of a composition, built into the weights again; bisect on such versions."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from engine_process import save_adapter
from personalities import commit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steer.store import creation
from steer.store.layout import Store
from steer.store.working import document


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose base is a pico model, which lies beside it."""
    monkeypatch.delenv("STEER_HOME", raising=False)
    model = pico.save(tmp_path / "base", "llama")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    made = creation.create(work, "tone")
    document.write(made.file, document.NEW.format(base=model))
    return made


def finetuned(folder: Path, *, favoured: int | None = None) -> Path:
    """A model whose weights all differ from the base's, or one that favours a token alone."""
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if favoured is None:
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        else:
            hidden = model.model.norm.weight
            model.lm_head.weight[favoured] += 0.5 * torch.randn(hidden.shape, generator=generator)
    model.save_pretrained(folder)
    for file in (folder.parent / "base").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_fine_tuned_model_is_a_part_and_is_built_bit_for_bit(store, steer, tmp_path):
    folder = finetuned(tmp_path / "poet")
    code, text, err = steer("add", folder)
    assert (code, text.strip()) == (0, "added poet"), err
    assert steer("commit", "-m", "A poet")[0] == 0
    assert steer("build", "-o", tmp_path / "built")[0] == 0
    expected, found = weights(folder), weights(tmp_path / "built")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    first = (store.work / "poet.safetensors").read_bytes()
    assert "poet.safetensors exists" in steer("add", folder)[2]
    (store.work / "poet.safetensors").unlink()
    assert steer("add", folder)[0] == 0
    assert (store.work / "poet.safetensors").read_bytes() == first


def test_an_adapter_is_a_part_at_any_strength(store, steer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path / "lora")
    code, _, err = steer("add", tmp_path / "lora", "--name", "poet", "--strength", "0.5")
    assert code == 0, err
    assert steer("commit", "-m", "Half a poet")[0] == 0
    assert steer("build", "-o", tmp_path / "built")[0] == 0
    found = weights(tmp_path / "built")
    after = model.state_dict()
    changed = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)
        changed += not torch.equal(tensor, before[name])
    assert changed > 5


def test_a_folder_that_is_neither_is_refused_and_nothing_is_written(store, steer, tmp_path):
    (tmp_path / "empty").mkdir()
    before = store.file.read_text()
    code, _, err = steer("add", tmp_path / "empty")
    assert code == 2
    assert "without config.json or adapter_config.json" in err
    assert (store.file.read_text(), list(store.work.glob("*.safetensors"))) == (before, [])


@pytest.mark.slow
def test_bisect_evaluates_versions_that_change_the_weights(store, steer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    token = tokenizer("warm", add_special_tokens=False).input_ids[0]
    assert steer("add", finetuned(tmp_path / "poet", favoured=token))[0] == 0
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
