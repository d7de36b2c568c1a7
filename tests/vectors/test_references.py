"""Model references: found once, by path, hub id or name; and an identity that only the model itself decides."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vectors import references
from vectors.errors import ModelError
from vectors.references import ModelSource, identity, licence, resolve
from vectors.storage import bundled

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def original(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, offline."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cache_model(hub: Path, source: Path, name: str = "org/name") -> Path:
    """Put a folder into the hub cache as the main revision of a model."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def digest(folder: Path, **source: Any) -> str:
    return identity(ModelSource(folder, **source))["digest"]


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- resolve ---


def test_a_folder_with_a_configuration_is_a_model_without_a_name(folder: Path) -> None:
    assert resolve(str(folder)) == ModelSource(folder)
    assert str(resolve(str(folder))) == str(folder)


def test_a_folder_in_the_home_is_found_by_its_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/copy") == ModelSource(folder)


@pytest.mark.parametrize("reference", ["smollm2", "org/name"])
def test_an_existing_path_wins_over_every_other_meaning(
    original: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    cache_model(hub, original)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, tmp_path / reference)
    assert resolve(reference) == ModelSource(Path(reference))


def test_what_needs_no_download_is_at_hand(folder: Path) -> None:
    """A path that does not exist is refused at once; an id of the hub may have to be fetched."""
    assert [references.at_hand(each) for each in (str(folder), "./absent", "absent", "org/absent@main")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json") as caught:
        resolve(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "save_pretrained" in caught.value.hint


def test_a_file_in_the_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        resolve(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "nonsense",
        "a/b/c",
        "./none",
        "/none/at/all",
        "../no-such-file",
        "~/none",
        "~nobodyatall/x",
        "org/",
        "org/@main",
        "@main",
        "a b",
        "a" * 300,
        "x\0y",
        "smollm3",
        "none.safetensors",
    ],
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_with_what_would_be(reference: str) -> None:
    with pytest.raises(ModelError, match="there is no model") as caught:
        resolve(reference)
    assert len(caught.value.problems) == 1
    assert "org/name@revision" in caught.value.hint
    assert "smollm2" in caught.value.hint


@pytest.mark.parametrize(
    "reference",
    ["org/name", "org/name@main", f"org/name@{COMMIT}", "or g/na me", "org/na..me", "ü/x", "o/" + "a" * 300],
)
def test_an_id_that_is_not_cached_is_one_clear_error_when_offline(hub: Path, reference: str) -> None:
    with pytest.raises(ModelError, match="is not in the cache and can't be fetched: ") as caught:
        resolve(reference)
    assert f"the model {reference} is" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "smollm2" in caught.value.hint


@pytest.mark.parametrize("reference", ["org/name", "org/name@main", f"org/name@{COMMIT}", "org/name@"])
def test_a_cached_model_is_found_offline_and_its_commit_recorded(hub: Path, original: Path, reference: str) -> None:
    snapshot = cache_model(hub, original)
    found = resolve(reference)
    assert found == ModelSource(snapshot, "org/name", COMMIT)
    assert str(found) == f"org/name@{COMMIT} ({snapshot})"


def test_another_revision_than_the_cached_one_is_not_taken_for_it(hub: Path, original: Path) -> None:
    cache_model(hub, original)
    with pytest.raises(ModelError, match="org/name@v2 is not in the cache"):
        resolve("org/name@v2")


@pytest.mark.parametrize("damage", ["weights", "config", "shard", "index", "tokenizer", "consolidated"])
def test_an_incomplete_snapshot_is_not_used(hub: Path, model: LlamaForCausalLM, tmp_path: Path, damage: str) -> None:
    source = tmp_path / "sharded"
    model.save_pretrained(source, max_shard_size="50KB")
    (source / "tokenizer.json").write_text("{}")
    snapshot = cache_model(hub, source)
    index = snapshot / "model.safetensors.index.json"
    shards = sorted(snapshot.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert references.cached() == [ModelSource(snapshot, "org/name", COMMIT)]
    if damage == "config":
        (snapshot / "config.json").unlink()
    elif damage == "shard":
        shards[-1].unlink()
    elif damage == "index":
        index.resolve().write_text('{"weight_map": ["no", "map"]}')
    elif damage == "tokenizer":
        (snapshot / "tokenizer.json").unlink()
    else:
        for path in [index, *shards]:
            path.unlink()
        if damage == "consolidated":  # the weights again, under names that transformers does not know
            (snapshot / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="the model org/name is incomplete"):
        resolve("org/name")
    assert references.cached() == []


def test_the_weights_that_transformers_reads_and_all_settings_are_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        raise ValueError("nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match="can't be fetched"):
        resolve("org/name")
    files = [
        "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
        "checkpoint-10/trainer_state.json",
        "config.json",
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "onnx/config.json",
        "original/model.safetensors",
        "pytorch_model.bin",
        "qwen.tiktoken",
        "tokenization_qwen.py",
        "tokenizer.json",
        "tokenizer.model",
    ]
    for options in asked:
        patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(files, **patterns)) == [
            "1_Pooling/config.json",
            "additional_chat_templates/tool_use.jinja",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "qwen.tiktoken",
            "tokenization_qwen.py",
            "tokenizer.json",
            "tokenizer.model",
        ]


def test_the_cached_models_are_listed_by_name(hub: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("org/b", "org/a"):
        cache_model(hub, original, name)
    assert [source.name for source in references.cached()] == ["org/a", "org/b"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "none"))
    assert references.cached() == []


def test_the_bundled_model_is_prepared_when_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(bundled, "prepare", lambda: folder)
    assert resolve("smollm2") == ModelSource(folder, "smollm2")


def test_the_folder_of_the_bundled_model_is_known_by_its_name(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(original, bundled.folder())
    assert resolve(str(bundled.folder())).name == "smollm2"


# --- identity ---


def test_the_identity_tells_architecture_size_and_layers(folder: Path) -> None:
    found = identity(ModelSource(folder))
    assert found.pop("digest").startswith("sha256:")
    assert found == {"architecture": "LlamaForCausalLM", "hidden_size": 16, "layers": 2}
    named = identity(ModelSource(folder, "org/name", COMMIT))
    assert (named["name"], named["revision"]) == ("org/name", COMMIT)


def test_copies_in_different_folders_under_different_names_have_one_digest(original: Path, folder: Path) -> None:
    assert digest(original) == digest(folder) == digest(folder, name="org/name", revision=COMMIT)


def test_the_sharding_does_not_change_the_digest(model: LlamaForCausalLM, original: Path, tmp_path: Path) -> None:
    digests = {digest(original)}
    for size in ("20KB", "50KB", "100KB"):
        sharded = tmp_path / size
        model.save_pretrained(sharded, max_shard_size=size)
        assert len(list(sharded.glob("*.safetensors"))) > 1
        digests.add(digest(sharded))
    assert len(digests) == 1


def test_loading_and_saving_a_model_does_not_change_its_digest(original: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(original).save_pretrained(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(original)


def tensor_names() -> list[str]:
    layer = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"]
    return [
        "model.embed_tokens.weight",  # 64 KiB, of which 4 are sampled
        "lm_head.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layer),
    ]


@pytest.mark.parametrize("name", tensor_names())
def test_a_fine_tune_of_any_one_tensor_changes_the_digest(original: Path, folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert digest(folder) != digest(original)


@pytest.mark.parametrize("change", ["rename", "dtype", "shape", "more", "fewer", "swap"])
def test_other_tensors_change_the_digest(original: Path, folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    q, k = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk")
    tensors |= {
        "rename": {"model.final_norm.weight": norm},
        "dtype": {"model.norm.weight": norm.view(torch.int32)},
        "shape": {"model.norm.weight": norm[None]},
        "more": {"model.norm.weight": norm, "model.norm.bias": norm},
        "fewer": {},
        "swap": {"model.norm.weight": norm, q: tensors[k], k: tensors[q]},
    }[change]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert digest(folder) != digest(original)


def test_a_setting_of_the_configuration_changes_the_digest(original: Path, folder: Path) -> None:
    change_config(folder, rms_norm_eps=1e-3)
    assert digest(folder) != digest(original)


@pytest.mark.parametrize(
    "key", ["_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"]
)
def test_what_differs_between_copies_of_a_configuration_does_not_count(original: Path, folder: Path, key: str) -> None:
    change_config(folder, **{key: "something else"})
    assert digest(folder) == digest(original)


def test_it_does_not_count_in_a_nested_configuration_either(folder: Path) -> None:
    digests = set()
    for path in ("/home/a", "/home/b"):
        change_config(folder, text_config={"hidden_size": 24, "num_hidden_layers": 3, "_name_or_path": path})
        digests.add(digest(folder))
    assert len(digests) == 1
    found = identity(ModelSource(folder))
    assert (found["hidden_size"], found["layers"]) == (24, 3)


def test_the_order_and_spacing_of_the_configuration_do_not_count(original: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert digest(folder) == digest(original)


def test_a_configuration_may_hold_infinity_as_that_of_mamba_does(original: Path, folder: Path) -> None:
    change_config(folder, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (folder / "config.json").read_text()
    assert digest(folder) != digest(original)


@pytest.mark.parametrize("name", ["warm.safetensors", "adapter_model.safetensors"])
def test_a_vector_saved_beside_the_weights_does_not_change_the_digest(original: Path, folder: Path, name: str) -> None:
    save_file({"layer.1": torch.ones(16)}, folder / name)
    (folder / "notes.txt").write_text("notes")
    assert digest(folder) == digest(original)


def test_weights_under_another_name_are_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    first = digest(folder)
    tensors = load_file(folder / "weights.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "weights.safetensors")
    assert digest(folder) != first


def test_a_model_whose_configuration_counts_as_gpt2_does_is_understood(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_embd": 48, "n_layer": 3}')
    found = identity(ModelSource(folder))
    assert (found["architecture"], found["hidden_size"], found["layers"]) == ("gpt2", 48, 3)


def header(value: object) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


def entry(start: Any, stop: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]}}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the length": lambda content: content[:7],
    "cut in the header": lambda content: content[:100],
    "cut in the data": lambda content: content[:-1],
    "a length that lies": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "no JSON": lambda content: header(b"{" * 50),
    "no UTF-8": lambda content: header(b'{"\xff": 1}'),
    "no object": lambda content: header([1, 2]),
    "deep nesting": lambda content: header(b"[" * 200_000),
    "an entry that is no object": lambda content: header({"x": 1}),
    "an entry without offsets": lambda content: header({"x": {"dtype": "F32", "shape": []}}),
    "one offset": lambda content: header({"x": {"dtype": "F32", "shape": [], "data_offsets": [0]}}),
    "offsets that are no numbers": lambda content: header(entry("0", "4")) + b"0000",
    "offsets that are no whole numbers": lambda content: header(entry(0.5, 2.5)) + b"0000",
    "negative offsets": lambda content: header(entry(-4, 0)) + b"0000",
    "offsets that go backwards": lambda content: header(entry(4, 0)) + b"0000",
    "offsets past the end": lambda content: header(entry(0, 10**30)) + b"0000",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_weight_file_is_a_model_error_that_names_it(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as caught:
        identity(ModelSource(folder))
    assert caught.value.hint == "fetch the model again"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 200_000])
def test_a_damaged_configuration_is_a_model_error(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        identity(ModelSource(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": "none.safetensors"}}'])
def test_a_damaged_index_is_a_model_error(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"is damaged|can't be read: No such file"):
        identity(ModelSource(folder))


# --- licence ---


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ("---\nlanguage: en\nlicense: mit\ntags:\n- x\n---\n", "mit"),
        ("---\nlicense: 'llama3.2'\n---\n", "llama3.2"),
        ('---\nlicense: "gemma"\n---\n', "gemma"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense_name: own\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: in the prose\n", None),
        ("---\nlanguage: en\n---\n\n---\nlicense: in a second block\n---\n", None),
        ("# Model\nlicense: in the prose\n---\nmore\n", None),
        ("license: in the prose\n\n---\n", None),
        ("# Model\n\n---\nlicense: after a rule\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_front_matter_of_the_model_card_states(
    folder: Path, card: str, expected: str | None
) -> None:
    (folder / "README.md").write_bytes(card.encode())
    assert licence(ModelSource(folder)) == expected


def test_a_model_card_that_is_no_text_states_no_licence(folder: Path) -> None:
    (folder / "README.md").write_bytes(bytes(range(256)))
    assert licence(ModelSource(folder)) is None


def test_a_folder_without_a_model_card_states_no_licence_and_the_bundled_model_has_its_own(folder: Path) -> None:
    (folder / "README.md").unlink(missing_ok=True)
    assert licence(ModelSource(folder)) is None
    assert licence(ModelSource(folder, "smollm2")) == "apache-2.0"
