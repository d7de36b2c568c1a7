"""The files beside the weights: all that belong to the model travel, nothing from outside its folder does."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merges import api
from merges.outputs.companions import MOST, companions, read
from merges.recipes.recipe import Part, Recipe, Tokenizer
from vectors.errors import ArtifactError, ModelError
from vectors.events import Event

SETTINGS = {
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "qwen.tiktoken", "modeling_odd.py", "configuration_odd.py", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "params.json", "logo.png",
    "LICENSE", "LICENSE-APACHE", "NOTICE", "USE_POLICY.md", "custom/inner/data.yaml", "mel_filters.npy", "no_suffix",
}  # fmt: skip
OTHERS = {
    "pytorch_model.bin": "other weights", "pytorch_model.bin.index.json": "an index of weights",
    "consolidated.safetensors": "other weights", "adapter_model.safetensors": "other weights",
    "model.Q4_K_M.gguf": "other weights", "onnx/model.onnx": "other weights",
    "onnx/model.onnx_data": "other weights", "tf_model.h5": "other weights", "flax_model.msgpack": "other weights",
    "original/consolidated.00.pth": "other weights", "2_Dense/pytorch_model.bin": "other weights",
    "model.ckpt.data-00000-of-00001": "other weights", "optimizer.pt": "other weights",
    "training_args.bin": "other weights", "trainer_state.json": "training state",
    "checkpoint-500/": "training state", "zero_to_fp32.py": "training state", "train.log": "a log", "runs/": "a log",
    "events.out.tfevents.17.host": "a log", "tokens.pkl": "a pickle, which can run code when it is read",
    ".git/": "a cache, or hidden", ".cache/": "a cache, or hidden", ".gitattributes": "a cache, or hidden",
    "__pycache__/": "a cache, or hidden", "run.json": "the record of the base",
    "README.md": "replaced by the card of the output",
}  # fmt: skip


def fill(folder: Path, names: Any) -> None:
    for name in names:
        path = folder / (name + "inner.txt" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "[]" if name == "modules.json" else "{}" if path.suffix == ".json" else f"content of {name}"
        path.write_text(content)


def merge(here: Path, **settings: Any) -> tuple[Path, list[str]]:
    notes: list[str] = []

    def listen(event: Event) -> None:
        notes.extend([event.message] if event.message else [])

    recipe = Recipe("task_arithmetic", (Part("a", "a", {"weight": 1.0}),), "base", **settings)
    api.merge(recipe, "out", on_event=listen)
    return here / "out", notes


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_every_file_that_is_not_weights_travels_and_the_others_are_named_with_a_reason(here: Path) -> None:
    fill(here / "base", SETTINGS | OTHERS.keys())
    before = {name: (here / "base" / name).read_bytes() for name in SETTINGS}
    out, _ = merge(here)
    assert {name: (out / name).read_bytes() for name in SETTINGS} == before
    written = {"README.md", "run.json", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(out) == SETTINGS | written | {"chat_template.jinja"}
    assert json.loads((out / "run.json").read_text())["details"]["left_out"] == OTHERS
    card = (out / "README.md").read_text()
    assert all(f"| `{name}` | {reason} |" in card for name, reason in OTHERS.items())
    api.verify(out)


def test_a_file_that_the_base_gets_later_is_no_fault_of_the_output_and_a_changed_one_is(here: Path) -> None:
    fill(here / "base", ["notes.md"])
    out, _ = merge(here)
    fill(here / "base", ["later.txt"])
    api.verify(out)
    (here / "base" / "notes.md").write_text("changed")
    with pytest.raises(ArtifactError, match=r"notes\.md: the recomputed file differs"):
        api.verify(out)


def test_models_within_the_folder_and_what_is_being_written_there_are_not_of_the_model(here: Path) -> None:
    fill(here / "base", ["merged/config.json", "merged/model.safetensors", "onnx/config.json", "onnx/model.onnx"])
    fill(here / "base", [".m.0123456789abcdef.partial/config.json", ".m.abcdefgh.01234567.steer-tmp", ".m.bake/a"])
    recipe = Recipe("task_arithmetic", (Part("a", "a", {"weight": 1.0}),), "base")
    api.merge(recipe, "base/out")
    details = json.loads((here / "base" / "out" / "run.json").read_text())["details"]
    assert details["left_out"] == {"merged/": "another model", "onnx/": "another model"}
    assert not (here / "base" / "out" / "onnx").exists()


def test_code_is_copied_with_a_word_in_the_card_and_in_the_notes(here: Path) -> None:
    fill(here / "base", ["modeling_odd.py", "parts/kernel.cu"])
    out, notes = merge(here)
    assert [note for note in notes if "modeling_odd.py, parts/kernel.cu" in note and "trust_remote_code" in note]
    card = (out / "README.md").read_text()
    assert "## Code" in card
    assert "- `modeling_odd.py`\n- `parts/kernel.cu`\n" in card


def test_weights_of_a_further_module_are_copied_and_it_is_said(here: Path) -> None:
    (here / "base" / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, here / "base" / "2_Dense" / "model.safetensors")
    (here / "base" / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    out, notes = merge(here)
    assert (out / "2_Dense" / "model.safetensors").is_file()
    assert any("2_Dense/model.safetensors is copied to the output as it is" in note for note in notes)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.onnx"])
def test_a_further_module_without_safetensors_is_refused_by_name(here: Path, weights: str) -> None:
    fill(here / "base", [f"2_Dense/{weights}", "2_Dense/config.json"])
    (here / "base" / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    with pytest.raises(ModelError, match=f"2_Dense/{weights} holds the weights of a module") as caught:
        merge(here)
    assert "safetensors" in caught.value.hint
    save_file({"linear.weight": torch.ones(2, 2)}, here / "base" / "2_Dense" / "model.safetensors")
    assert not (merge(here)[0] / "2_Dense" / weights).exists()


def test_what_training_left_in_a_further_module_is_no_weight(here: Path) -> None:
    fill(here / "base", ["2_Dense/training_args.bin", "2_Dense/optimizer.pt", "2_Dense/config.json"])
    (here / "base" / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    assert not (merge(here)[0] / "2_Dense" / "training_args.bin").exists()


SECRET = "the key of somebody"


def outside(here: Path) -> Path:
    secret = here / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_text(SECRET)
    return secret


def assert_secret_stays(out: Path) -> None:
    assert not [path for path in out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("../elsewhere/secret", "a link that leaves the folder"),
        ("{here}/elsewhere/secret", "a link that leaves the folder"),
        ("inner/up/elsewhere/secret", "a link that leaves the folder"),
        ("other", "a link that leaves the folder"),
        ("/dev/zero", "a link that leaves the folder"),
        ("../elsewhere", "a link that leaves the folder"),
        ("nothing", "a link to nothing"),
        ("notes.txt", "a link that leads back to itself"),
        (".", "a link to a folder"),
        ("inner", "a link to a folder"),
    ],
)
def test_a_link_that_is_no_file_of_the_folder_is_left_out_and_it_is_said(here: Path, target: str, reason: str) -> None:
    outside(here)
    (here / "base" / "inner").mkdir()
    (here / "base" / "inner" / "up").symlink_to("../..")
    (here / "base" / "other").symlink_to("../elsewhere/secret")
    (here / "base" / "notes.txt").symlink_to(target.format(here=here))
    out, notes = merge(here)
    assert_secret_stays(out)
    assert not os.path.lexists(out / "notes.txt")
    assert f"base/notes.txt is not in the output: it is {reason}" in notes
    assert f"| `notes.txt` | {reason} |" in (out / "README.md").read_text()


def test_a_link_inside_the_folder_is_copied_as_a_file(here: Path) -> None:
    fill(here / "base", ["texts/long.txt"])
    (here / "base" / "short.txt").symlink_to("texts/long.txt")
    (here / "base" / "again.txt").symlink_to("short.txt")
    out, notes = merge(here)
    assert (out / "short.txt").read_text() == (out / "again.txt").read_text() == "content of texts/long.txt"
    assert not (out / "short.txt").is_symlink()
    assert not [note for note in notes if "not in the output" in note]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_configuration_or_tokenizer_from_outside_is_refused_before_any_work(here: Path, name: str) -> None:
    (here / "base" / name).rename(here / name)
    (here / "base" / name).symlink_to(f"../{name}")
    with pytest.raises(ModelError, match=rf"base/{name} can't be copied: it is a link that leaves the folder"):
        merge(here)
    assert not [entry for entry in os.listdir(here) if entry.startswith((".out", "out"))]


def test_the_tokenizer_of_another_input_does_not_come_from_outside_either(here: Path) -> None:
    outside(here)
    (here / "a" / "tokenizer.json").write_bytes((here / "base" / "tokenizer.json").read_bytes())
    (here / "a" / "tokenizer_config.json").symlink_to("../elsewhere/secret")
    with pytest.raises(ModelError, match=r"a/tokenizer_config\.json can't be copied: it is a link that leaves"):
        merge(here, tokenizer=Tokenizer("a"))


def test_a_chat_template_of_an_input_is_not_read_from_outside(here: Path) -> None:
    outside(here)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (here / "base" / name).unlink(missing_ok=True)
    (here / "a" / "chat_template.jinja").symlink_to("../elsewhere/secret")
    out, _ = merge(here, chat_template="auto")
    assert_secret_stays(out)


def test_weights_that_are_read_through_a_link_from_outside_are_named(here: Path) -> None:
    (here / "base" / "model.safetensors").rename(here / "weights")
    (here / "base" / "model.safetensors").symlink_to("../weights")
    out, notes = merge(here)
    assert "base/model.safetensors is read through a link that leaves the folder" in notes
    assert "through a link which leaves its folder:\n\n- `model.safetensors`" in (out / "README.md").read_text()


def as_hub_cache(here: Path, name: str) -> Path:
    """The folder as a snapshot of the hub's cache, whose files are links to blobs."""
    repository = here / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in (here / name).rglob("*") if path.is_file())):
        relative = path.relative_to(here / name)
        (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / str(number))
        (snapshot / relative).symlink_to("../" * len(relative.parts) + f"../blobs/{number}")
    return snapshot


def test_the_links_of_the_hub_cache_are_understood_and_no_others(here: Path) -> None:
    outside(here)
    fill(here / "base", ["1_Pooling/config.json"])
    snapshot = as_hub_cache(here, "base")
    for name, target in (("a", "../../blobs/../../../elsewhere/secret"), ("b", "../../refs"), ("c", "../../../../a")):
        (snapshot / f"{name}.txt").symlink_to(target)
    (snapshot.parent.parent / "refs").write_text(SECRET)
    (snapshot.parent.parent / "blobs" / "on").symlink_to("../../../elsewhere/secret")
    (snapshot / "d.txt").symlink_to("../../blobs/on")
    beside = companions(snapshot, [snapshot / "model.safetensors"])
    assert {"config.json", "tokenizer.json", "1_Pooling/config.json"} <= beside.files.keys()
    assert beside.linked == ()
    assert beside.left_out == dict.fromkeys(["a.txt", "b.txt", "c.txt", "d.txt"], "a link that leaves the folder")
    out = here / "merged"
    api.merge(Recipe("task_arithmetic", (Part("a", "a", {"weight": 1.0}),), str(snapshot)), out)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert_secret_stays(out)


def test_blobs_that_are_a_link_themselves_are_no_way_out(here: Path) -> None:
    outside(here)
    snapshot = here / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").symlink_to("../elsewhere")
    (snapshot / "notes.txt").symlink_to("../../blobs/secret")
    assert companions(snapshot).left_out == {"notes.txt": "a link that leaves the folder"}


def test_pipes_sockets_and_devices_are_left_out_without_waiting_for_them(here: Path) -> None:
    base = here / "base"
    os.mkfifo(base / "pipe.txt")
    (base / "linked.txt").symlink_to("pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("base/socket.txt")
    out, notes = merge(here)
    assert not {"pipe.txt", "linked.txt", "socket.txt"} & files_of(out)
    assert sum("it is a pipe, socket or device" in note for note in notes) == 3


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_tokenizer_file_is_refused(here: Path, name: str) -> None:
    (here / "base" / name).unlink()
    os.mkfifo(here / "base" / name)
    with pytest.raises(ModelError, match=rf"base/{name} can't be copied: it is a pipe"):
        merge(here)


def test_a_copy_is_readable_by_no_more_people_than_the_original(here: Path) -> None:
    fill(here / "base", ["private.txt", "shared.txt", "read_only.txt", "run.txt"])
    for name, mode in (("private", 0o600), ("shared", 0o644), ("read_only", 0o444), ("run", 0o755)):
        (here / "base" / f"{name}.txt").chmod(mode)
    before = os.umask(0o022)
    try:
        out, _ = merge(here)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.glob("*.txt")}
    assert modes == {"private.txt": 0o600, "shared.txt": 0o644, "read_only.txt": 0o644, "run.txt": 0o644}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_a_file_that_can_not_be_read_is_left_out_and_it_is_said(here: Path) -> None:
    fill(here / "base", ["private.txt"])
    (here / "base" / "private.txt").chmod(0)
    _, notes = merge(here)
    assert "base/private.txt is not in the output: it is not readable" in notes


def test_odd_names_do_no_harm(here: Path) -> None:
    fill(here / "base", ["a|b`c.md", "x\n| y | z |.md", "ünï.md"])
    (here / os.fsdecode(b"base/\xff.md")).write_text("")
    fill(here / "base", ["d\x1b[2J.log"])
    out, notes = merge(here)
    assert {"a|b`c.md", "x\n| y | z |.md", "ünï.md"} <= files_of(out)
    assert any("a name that is not UTF-8" in note for note in notes)
    card = (out / "README.md").read_text()
    assert "\x1b" not in card
    assert "\n| y" not in card


def test_too_many_files_are_refused(here: Path) -> None:
    (here / "base" / "images").mkdir()
    for i in range(MOST + 1):
        os.symlink("x", here / "base" / "images" / str(i))
    with pytest.raises(ModelError, match="more than 10000 files"):
        merge(here)


def test_very_deep_folders_are_left_out_by_name(here: Path) -> None:
    deep = here / "base" / "/".join("d" * 12)
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("")
    beside = companions(here / "base")
    assert "more than 8 folders deep" in beside.left_out.values()


def test_an_interrupted_output_that_holds_folders_is_resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(here / "base", ["1_Pooling/config.json"])
    from merges.outputs import model_folder

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "card_lines", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(here)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    out, _ = merge(here)
    assert (out / "1_Pooling" / "config.json").is_file()


def test_the_content_of_a_companion_is_read_only_from_the_folder(here: Path) -> None:
    fill(here / "base", ["notes.txt"])
    note = companions(here / "base").files["notes.txt"]
    outside(here)
    (here / "base" / "notes.txt").unlink()
    (here / "base" / "notes.txt").symlink_to("../elsewhere/secret")  # after it was listed
    with pytest.raises(ModelError, match="a link that leaves the folder"):
        read(note)
