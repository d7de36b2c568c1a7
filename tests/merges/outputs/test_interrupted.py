"""What is cut short leaves nothing that could be taken for a result, and goes on where it was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import folders
import pytest
import torch
from safetensors.torch import save_file

from merges import api
from merges.api import diff
from merges.recipes.document import read
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ArtifactError, ModelError, OutputError
from vectors.storage.files import digest_file
from vectors.storage.runs import RunRecord

MADE = Recipe("task_arithmetic", (Part("a", "a"), Part("b", "b", {"weight": 0.5})), "base")
# At the fourth shard: killed, interrupted, or the disk is full (a limit on the size of files says the same).
CHILD = """
import json, os, resource, signal, sys
from merges import api
from merges.api import diff
from merges.outputs import shards
from merges.recipes.document import parse

original, calls = shards.write, []

def write(path, content, show):
    calls.append(path)
    if len(calls) == 4:
        if sys.argv[1] == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        else:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return original(path, content, show)

shards.write = write
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    api.merge(parse(json.loads(sys.argv[2])), "out", shard=900)
except KeyboardInterrupt:
    sys.exit(9)
except Exception as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "full"])
def test_a_merge_that_is_cut_short_goes_on_where_it_was(here: Path, how: str) -> None:
    command = [sys.executable, "-c", CHILD, how, json.dumps(MADE.value())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 9, "full": 1}[how], done.stderr
    assert how != "full" or "out can't be written: File too large" in done.stderr
    assert not (here / "out").exists()
    (partial,) = here.glob(".out.*.partial")
    finished = json.loads((partial / "progress.json").read_text())["outputs"]
    assert len(finished) == 3
    kept = {name: (partial / name).stat().st_ino for name in finished}
    api.merge(MADE, "out", shard=900)
    api.merge(MADE, "whole", shard=900)
    assert {name: (here / "out" / name).stat().st_ino for name in kept} == kept
    assert folders.same(here / "out", here / "whole")
    assert not list(here.glob(".out*"))


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, kind: type[BaseException] = KeyboardInterrupt) -> None:
    """The next merge is interrupted after so many shards."""
    from merges.outputs import shards

    original, calls = shards.write, []

    def write(path, content, show):  # type: ignore[no-untyped-def]
        calls.append(path)
        if len(calls) > after:
            raise kind
        return original(path, content, show)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write", write)
        with pytest.raises(kind):
            api.merge(MADE, "out", shard=900)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_before_the_first_shard_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    interrupted(monkeypatch, 0, kind)
    assert not list(here.glob(".out*"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_behind_a_shard_leaves_it_to_be_taken_up(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    interrupted(monkeypatch, 1, kind)
    (partial,) = here.glob(".out.*.partial")
    assert len(json.loads((partial / "progress.json").read_text())["outputs"]) == 1


def test_finished_shards_of_inputs_that_changed_are_not_believed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 3)
    changed = folders.read(here / "a")
    # Where no sample of the identity looks: the plan stays the same, the bytes do not.
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"].clone()
    changed["lm_head.weight"][0, 0] += 1
    save_file(changed, here / "a" / "model.safetensors", {"format": "pt"})
    api.merge(MADE, "out", shard=900)
    api.merge(MADE, "again", shard=900)
    assert folders.same(here / "out", here / "again")
    api.verify("out")


def test_inputs_that_change_while_they_are_read_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merges.outputs import model_folder

    original = model_folder.side_files

    def touching(*arguments):  # type: ignore[no-untyped-def]
        (here / "a" / "model.safetensors").touch()
        return original(*arguments)

    monkeypatch.setattr(model_folder, "side_files", touching)
    with pytest.raises(ModelError, match=r"a/model\.safetensors was changed while it was being merged"):
        api.merge(MADE, "out")
    assert not list(here.glob("*out*"))


def test_what_other_plans_left_unfinished_goes_when_the_output_is_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 3)
    assert list(here.glob(".out.*.partial"))
    mine = here / ".out.notes.partial"
    mine.mkdir()  # somebody else's, by its name
    api.merge(Recipe("task_arithmetic", (Part("a", "a"),), "base"), "out")
    assert list(here.glob(".out*")) == [mine]


def test_values_that_cannot_be_merged_leave_nothing(here: Path) -> None:
    broken = folders.read(here / "a") | {"model.norm.weight": torch.full((8,), torch.nan).bfloat16()}
    save_file(broken, here / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"a holds a value that is not finite in model\.norm\.weight"):
        api.merge(MADE, "out", shard=900)  # its first shards were written already
    assert not list(here.glob(".out*"))


def test_a_merge_is_verified_where_its_inputs_lie_now(here: Path, tmp_path: Path) -> None:
    api.merge(MADE, "out")
    (here / "moved").mkdir()
    for name in ("a", "b", "base"):
        shutil.move(here / name, here / "moved" / f"{name}2")
    with pytest.raises(ArtifactError, match="there is no model 'a'") as caught:
        api.verify("out")
    assert "--vector NAME=PATH" in caught.value.hint
    moved = {name: here / "moved" / f"{name}2" for name in ("a", "b", "base")}
    api.verify("out", paths=moved)
    config = here / "out" / "config.json"
    config.write_text(config.read_text().replace("llama", "lama"))
    with pytest.raises(ArtifactError, match=r"config\.json is not what was written"):
        api.verify("out", paths=moved)
    record = here / "out" / "run.json"
    told = json.loads(record.read_text())
    from vectors.storage.files import digest_bytes

    told["outputs"]["config.json"] = digest_bytes(config.read_bytes())  # the record may lie, the recipe can't
    record.write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match=r"config\.json: the recomputed file differs"):
        api.verify("out", paths=moved)


def test_making_m_leaves_the_unfinished_work_of_an_output_called_m_v2(here: Path) -> None:
    for name in (".out.v2.0123456789abcdef.partial", ".out.0123456789abcdef.partial"):
        (here / name).mkdir()
    api.merge(MADE, "out")
    assert [path.name for path in here.glob(".out*")] == [".out.v2.0123456789abcdef.partial"]


def test_a_link_at_the_name_of_the_work_folder_is_refused_and_not_followed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 3)
    (partial,) = here.glob(".out.*.partial")
    partial.rename(here / "elsewhere")
    partial.symlink_to(here / "elsewhere")
    (here / "elsewhere" / "notes.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not a folder that this user can write"):
        api.merge(MADE, "out", shard=900)
    assert (here / "elsewhere" / "notes.txt").read_text() == "precious"


def test_a_task_vector_written_to_a_link_lies_where_the_link_leads(here: Path) -> None:
    (here / "store").mkdir()
    (here / "v.safetensors").symlink_to(here / "store" / "target.safetensors")
    diff("base", "a", "v.safetensors")
    assert (here / "v.safetensors").is_symlink()
    assert [path.name for path in (here / "store").iterdir()] == ["target.safetensors"]


def test_a_vector_that_is_killed_half_way_leaves_nothing_behind_the_next_run(here: Path) -> None:
    script = "import os; os.fsync = lambda handle: os.kill(os.getpid(), 9)\nfrom merges.api import diff\n"
    done = subprocess.run([sys.executable, "-c", script + "diff('base', 'a', 'v.safetensors')"], cwd=here)
    assert done.returncode == -signal.SIGKILL
    assert len(list(here.glob(".v.*"))) == 1
    assert not (here / "v.safetensors").exists()
    diff("base", "a", "v.safetensors")
    assert not list(here.glob(".v.*"))


def test_each_file_of_a_vector_in_several_files_is_recorded_by_its_own_digest(here: Path) -> None:
    record = api.merge(replace(MADE, as_="vector"), "v.safetensors", shard=900)
    files = sorted(path.name for path in here.glob("v-*.safetensors"))
    assert len(files) > 1
    assert record["outputs"] == {name: digest_file(here / name) for name in files}


def test_a_merge_of_an_earlier_version_is_still_verified_and_still_a_recipe(here: Path) -> None:
    record = api.merge(MADE, "out")
    (here / "out" / "run.json").unlink()
    (here / "out" / "steer_merge.json").write_text(json.dumps(record))
    assert api.verify("out") == record
    assert read(here / "out" / "steer_merge.json") == MADE


def test_a_merge_that_was_cut_short_between_its_record_and_its_name_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_folder: Path, _out: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vectors.storage.folders.publish", full)
        with pytest.raises(OutputError, match="No space left"):
            api.merge(MADE, "out")
    (partial,) = here.glob(".out.*.partial")
    assert (partial / "run.json").is_file()
    api.merge(MADE, "out")
    api.verify("out")


def test_the_record_of_a_bake_is_no_merge_to_be_verified(here: Path) -> None:
    RunRecord("bake", "fold").write(here / "base")
    with pytest.raises(ArtifactError, match="is the record of `steer bake`, not of a merge"):
        api.verify("base")


def test_records_beside_a_base_are_not_copied(here: Path) -> None:
    for name in ("run.json", "report.json", "steer_merge.json"):
        (here / "base" / name).write_text(json.dumps({"of": "the base"}))
    record = api.merge(MADE, "out")
    assert not {"run.json", "report.json", "steer_merge.json"} & set(record["outputs"])
    assert json.loads((here / "out" / "run.json").read_text())["command"] == "merge"
    assert not (here / "out" / "report.json").exists()
