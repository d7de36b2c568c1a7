"""Versions that were pulled from anywhere write vectors into the working folder, and nothing anywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from personalities import commit, new_store

from steer.store import blobs, referrers, refs
from steer.store.layout import Store
from steer.store.objects.model import COMPOSITION, Commit, Personality, read_commit, read_composition
from steer.store.objects.writing import put_commit, put_composition
from steer.store.remotes import open_remote, transfer
from steer.store.using.realise import realise
from steer.store.verify import verify
from steer.store.working import checkout
from vectors.errors import ArtifactError, OutputError
from vectors.storage.files import digest_bytes


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("STEER_HOME", raising=False)
    made = new_store(tmp_path / "mine" / "work", "mine")
    commit(made, "Calm", calm=1.0)
    return made


def pulled(store: Store, tmp_path: Path, path: str) -> str:
    """A commit from another store whose document gives a part this path."""
    theirs = new_store(tmp_path / "theirs", "tone")
    first = commit(theirs, "Warm", warm=1.0)
    written = f"base: pico\nparts:\n- {json.dumps({'name': 'warm', 'strength': 1.0, 'path': path})}\n"
    made = Commit("", read_commit(theirs, first).composition, (first,), "Warmer", "them", 1e9, "steer commit")
    refs.point(theirs, {refs.branch("tone"): put_commit(theirs, made, written)}, "steer commit")
    (tmp_path / "remote").mkdir()
    remote = str(tmp_path / "remote")
    transfer.push(theirs, open_remote(remote, "tone"), "tone")
    transfer.pull(store, open_remote(remote, "tone"), "tone", "steer pull")
    digest = refs.target(store, refs.branch("tone"))
    assert digest is not None
    return digest


@pytest.mark.parametrize(
    "path", ["../planted.safetensors", "link/planted.safetensors", ".steer/HEAD.safetensors", "bin/run.sh", "absolute"]
)
def test_a_path_that_is_not_a_vector_in_the_working_folder_is_never_written(store, tmp_path, path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.work / "link").symlink_to(outside)
    if path == "absolute":
        path = str(outside / "planted.safetensors")
    digest = pulled(store, tmp_path, path)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    for force in (False, True):
        with pytest.raises(OutputError, match=r"is no \.safetensors file of the working folder"):
            checkout.checkout(store, digest, "tone", "steer checkout tone", force=force)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
    assert refs.current(store) == "mine"


def test_a_part_in_a_folder_of_the_working_folder_is_written(store, tmp_path):
    digest = pulled(store, tmp_path, "vectors/warm.safetensors")
    assert checkout.checkout(store, digest, "tone", "steer checkout tone") == ["vectors/warm.safetensors"]
    assert (store.work / "vectors" / "warm.safetensors").is_file()


def test_a_part_whose_name_is_a_path_is_refused(store):
    personality = read_composition(store, read_commit(store, refs.target(store, refs.branch("mine"))).composition)
    (part,) = personality.parts
    for name in ("../../../planted", "a/b", "a\\b", "x" * 101, "a\nb"):
        bad = put_composition(store, Personality("pico", parts=(replace(part, name=name),)))
        made = put_commit(store, Commit("", bad, (), "m", "a", 1e9, "c"), "base: pico\nparts: []\n")
        with pytest.raises(ArtifactError, match="not a name"):
            realise(store, made)
    assert blobs.read_json(store, bad)["artifactType"] == COMPOSITION
    assert not list(store.work.parent.rglob("planted*"))


def remote_with(tmp_path: Path, change: Callable[[dict, dict], None]) -> str:
    """A remote whose commit was changed: `change` gets its manifest and its config."""
    theirs = new_store(tmp_path / "theirs", "tone")
    commit(theirs, "Warm", warm=1.0)
    folder = tmp_path / "remote"
    folder.mkdir()
    transfer.push(theirs, open_remote(str(folder), "tone"), "tone")

    def put(value: object) -> str:
        content = json.dumps(value).encode()
        digest = digest_bytes(content)
        (folder / "blobs" / "sha256" / digest[7:]).write_bytes(content)
        return digest

    def get(digest: str) -> dict:
        return json.loads((folder / "blobs" / "sha256" / digest[7:]).read_text())

    index = json.loads((folder / "index.json").read_text())
    (entry,) = index["manifests"]
    manifest = get(entry["digest"])
    config = get(manifest["config"]["digest"])
    change(manifest, config)
    if isinstance(manifest.get("config"), dict):
        manifest["config"]["digest"] = put(config)
    entry["digest"] = put(manifest)
    (folder / "index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, config: manifest["layers"][0].pop("size"),
        lambda manifest, config: manifest["layers"][0].pop("mediaType"),
        lambda manifest, config: manifest.pop("layers"),
        lambda manifest, config: manifest.update(layers="all"),
        lambda manifest, config: manifest.update(config=7),
        lambda manifest, config: manifest.update(subject="sha256:" + "0" * 64),
        lambda manifest, config: config.update(parents=[7]),
        lambda manifest, config: config.update(parents="sha256:" + "0" * 64),
        lambda manifest, config: config.pop("composition"),
        lambda manifest, config: config.update(parents=["../../x"]),
    ],
)
def test_a_remote_that_sends_something_else_than_a_version_moves_no_name(store, tmp_path, change):
    before = refs.every(store)
    with pytest.raises(ArtifactError):
        transfer.pull(store, open_remote(remote_with(tmp_path, change), "tone"), "tone", "steer pull")
    assert refs.every(store) == before
    assert verify(store).problems == ()


@pytest.mark.parametrize("moment", [-1e30, 1e30, -1e12])
def test_a_version_from_any_time_is_in_the_log(store, tmp_path, steer, moment, monkeypatch):
    remote = remote_with(tmp_path, lambda manifest, config: config.update(time=moment))
    transfer.pull(store, open_remote(remote, "tone"), "tone", "steer pull")
    monkeypatch.chdir(store.work)
    code, text, err = steer("log", "tone")
    assert code == 0, err
    assert "Warm" in text


def test_a_damaged_report_that_is_attached_leaves_the_log_readable(store, steer, monkeypatch):
    tip = refs.target(store, refs.branch("mine"))
    files = {"report.json": b"{", "items.json": b"{}"}
    referrers.attach(store, read_commit(store, tip).composition, referrers.EVALUATION, files)
    monkeypatch.chdir(store.work)
    assert "Calm" in steer("log")[1]
