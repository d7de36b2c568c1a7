"""Push and pull: what arrives is what was sent, whole or not at all, over folders, a registry and the hub's API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from hub_stand_in import StandIn
from personalities import commit, new_store
from test_survival import killed_at

from steer.store import layout, names, referrers, refs
from steer.store.objects.model import read_commit
from steer.store.remotes import open_remote, transfer
from steer.store.remotes import registry as registry_remote
from steer.store.verify import verify
from steer.store.working import checkout
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.storage.files import digest_file


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """The address of a real OCI registry on the loopback."""
    program = shutil.which("docker-registry") or shutil.which("registry")
    if program is None:
        pytest.skip("there is no docker-registry (Debian's package of this name)")
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub, which huggingface_hub is pointed to."""
    from huggingface_hub import HfApi

    server = StandIn()
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    made = HfApi.__init__

    def at_the_stand_in(self, *arguments, **options):
        made(self, *arguments, **{**options, "endpoint": server.url, "token": "t"})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "__init__", at_the_stand_in)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.shutdown()


@pytest.fixture(params=["folder", "memory", "registry", "hub"])
def url(request, tmp_path):
    """A remote of each kind."""
    if request.param == "folder":
        return str(tmp_path / "remote")
    if request.param == "memory":
        return f"memory://{tmp_path}/remote"
    if request.param == "registry":
        return f"oci://{request.getfixturevalue('registry')}/{tmp_path.name.lower().replace('_', '-')}"
    request.getfixturevalue("hub")
    return "hf://user/tone"


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path / "tone")
    first = commit(store, "Warm", warm=1.2)
    refs.point(store, {refs.tag("tone", "v1"): first}, "tag")
    attach(store, first, b'{"subjects": []}')
    second = commit(store, "Formal", formal=-0.4)
    refs.point(store, {refs.alias("tone", "champion"): second}, "promote")
    return store


def attach(store, commit_digest: str, report: bytes) -> str:
    composition = read_commit(store, commit_digest).composition
    return referrers.attach(store, composition, referrers.EVALUATION, {"report.json": report})


def push(store, url, **options):
    return transfer.push(store, open_remote(url, "tone"), "tone", **options)


def pull(store, url, **options):
    return transfer.pull(store, open_remote(url, "tone"), "tone", "pull", **options)


def test_what_is_pushed_comes_back_the_same(store, url, tmp_path):
    sent = push(store, url)
    assert set(sent.names) == {"tone", "tone:v1", "tone@champion"}
    assert push(store, url).objects == 0
    other = new_store(tmp_path / "other", "mine")
    pull(other, url)
    assert {key: refs.target(other, key) for key in refs.every(store)} == refs.every(store)
    assert referrers.every(other) == referrers.every(store) != {}
    assert not verify(other).problems
    later = attach(store, names.resolve(store, "tone:v1"), b'{"subjects": [1]}')
    assert push(store, url).objects == 2  # of what is attached later, the manifest and its file
    assert pull(other, url).objects == 2
    assert any(later in each for each in referrers.every(other).values())
    assert push(other, url).objects == 0
    checkout.checkout(other, names.resolve(other, "tone"), "tone", "", force=True)
    assert digest_file(other.work / "warm.safetensors") == digest_file(store.work / "warm.safetensors")
    third = commit(store, "Calm", calm=0.5)
    assert 0 < push(store, url).objects < sent.objects
    assert pull(other, url).names["tone"] == third


def test_a_pull_fetches_every_object_a_single_time(store, tmp_path):
    url = str(tmp_path / "remote")
    push(store, url)
    remote = open_remote(url, "tone")
    fetched, get = [], remote.get

    def counted(item, target):
        fetched.append(item.digest)
        get(item, target)

    remote.get = counted
    transfer.pull(new_store(tmp_path / "other", "mine"), remote, "tone", "pull")
    assert len(fetched) == len(set(fetched)) > 10


def test_versions_that_only_the_other_side_has_are_not_lost(store, url, tmp_path):
    push(store, url)
    other = new_store(tmp_path / "other", "mine")
    pull(other, url)
    checkout.checkout(other, names.resolve(other, "tone"), "tone", "", force=True)
    theirs = commit(other, "Theirs", calm=1.0)
    push(other, url)
    commit(store, "Ours", warm=0.1)
    with pytest.raises(OutputError, match="has versions that the other side has not"):
        push(store, url)
    with pytest.raises(OutputError, match="has versions that the other side has not"):
        pull(store, url)
    pull(store, url, as_="theirs")
    assert names.resolve(store, "theirs") == theirs


def test_a_tag_does_not_move_on_the_way(store, url):
    push(store, url)
    refs.point(store, {refs.tag("tone", "v1"): names.resolve(store, "HEAD")}, "tag", force=True)
    with pytest.raises(OutputError, match="the tag tone:v1"):
        push(store, url)
    push(store, url, force=True)


def test_an_unknown_personality_is_refused_with_what_there_is(store, url):
    with pytest.raises(UsageError, match="no personality tone"):
        pull(store, url)
    with pytest.raises(UsageError, match="no branch tune"):
        transfer.push(store, open_remote(url, "tune"), "tune")


@pytest.mark.slow
def test_a_push_that_is_killed_anywhere_is_invisible_and_can_be_repeated(store, tmp_path):
    begun = str(tmp_path / "begun")
    push(store, begun)
    before = open_remote(begun, "tone").names()
    third = commit(store, "Calm", calm=0.5)
    for write in range(0, 200, 2):
        url = str(tmp_path / f"remote-{write}")
        shutil.copytree(begun, url)
        killed = killed_at(write, lambda: push(store, url))  # noqa: B023
        now = open_remote(url, "tone").names()
        assert now == before or now["tone"] == third
        fresh = new_store(tmp_path / f"fresh-{write}", "mine")
        pull(fresh, url)
        assert not verify(fresh).problems
        push(store, url)
        assert open_remote(url, "tone").names()["tone"] == third
        if not killed:
            break
    assert write > 4
    assert not killed


@pytest.mark.slow
def test_a_pull_that_is_killed_anywhere_moves_no_name_to_what_is_not_there(store, tmp_path):
    url = str(tmp_path / "remote")
    push(store, url)
    write = 0
    while True:
        fresh = new_store(tmp_path / f"fresh-{write}", "mine")
        killed = killed_at(write, lambda: pull(fresh, url))  # noqa: B023
        for digest in refs.every(fresh).values():
            assert digest in refs.every(store).values()
        assert not verify(fresh).problems
        pull(fresh, url)
        assert not verify(fresh).problems
        if not killed:
            break
        write += 5


def test_a_remote_that_sends_other_bytes_is_noticed_before_a_name_moves(store, tmp_path):
    url = tmp_path / "remote"
    push(store, str(url))
    for blob in sorted((url / "blobs" / "sha256").iterdir()):
        content = blob.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        blob.chmod(0o644)
        blob.write_bytes(damaged)
        fresh = new_store(tmp_path / blob.name, "mine")
        with pytest.raises(ArtifactError, match=r"other bytes|damaged"):
            pull(fresh, str(url))
        assert refs.every(fresh) == {}
        blob.write_bytes(content)


def test_what_refers_to_another_composition_than_the_remote_says_is_refused(store, tmp_path):
    url = tmp_path / "remote"
    push(store, str(url))
    index = json.loads((url / "index.json").read_text())
    (attached,) = [each for each in index["manifests"] if "steer.subject" in each["annotations"]]
    attached["annotations"]["steer.subject"] = read_commit(store, names.resolve(store, "tone")).composition
    (url / "index.json").write_text(json.dumps(index))
    fresh = new_store(tmp_path / "fresh", "mine")
    with pytest.raises(ArtifactError, match="does not refer to"):
        pull(fresh, str(url))
    assert refs.every(fresh) == {}


NAMED = {"org.opencontainers.image.ref.name": "tone"}


@pytest.mark.parametrize(
    "index",
    [[], 5, {"manifests": 5}, {"manifests": [5]}, {"manifests": [{"digest": "sha256:../x", "annotations": NAMED}]}],
)
def test_a_remote_is_not_trusted(store, tmp_path, index):
    url = tmp_path / "remote"
    push(store, str(url))
    (url / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="damaged"):
        pull(store, str(url))


def test_other_tools_pull_a_version_from_the_registry(store, registry, tmp_path):
    import oras.client

    url = f"oci://{registry}/tools"
    push(store, url)
    client = oras.client.OrasClient(hostname=registry, insecure=True)
    for tag, files in (("latest", {"warm", "formal"}), ("v1", {"warm"}), ("champion", {"warm", "formal"})):
        target = tmp_path / tag
        client.pull(target=f"{registry}/tools/tone:{tag}", outdir=str(target))
        assert {path.stem for path in target.glob("*.safetensors")} == files
        for name in files:
            assert digest_file(target / f"{name}.safetensors") == digest_file(store.work / f"{name}.safetensors")
        assert "base: pico" in (target / "personality.yaml").read_text()
        assert "base_model: pico" in (target / "README.md").read_text()


def test_what_is_attached_is_listed_where_other_tools_look_in_a_registry_without_referrers(store, registry):
    remote = open_remote(f"oci://{registry}/attached", "tone")
    transfer.push(store, remote, "tone")
    composition = read_commit(store, names.resolve(store, "tone:v1")).composition
    tag = composition.replace(":", "-")
    first = remote._listed(tag)
    assert [(each["digest"], each["artifactType"]) for each in first] == [
        (each.digest, each.kind) for each in referrers.of(store, composition)
    ]
    foreign = {
        "mediaType": "application/json",
        "digest": first[0]["digest"],
        "size": 1,
        "annotations": {"of": "others"},
    }
    remote._put_manifest(tag, json.dumps(layout.index([*first, foreign])).encode(), registry_remote.INDEX)
    later = attach(store, names.resolve(store, "tone:v1"), b'{"subjects": [2]}')
    push(store, f"oci://{registry}/attached")
    assert [each["digest"] for each in remote._listed(tag)] == [first[0]["digest"], first[0]["digest"], later]
    assert foreign in remote._listed(tag)


def test_a_baked_model_is_a_modelpack_that_other_tools_pull(steer, registry, tmp_path):
    import oras.client
    import pico

    from steer.store import blobs
    from steer.store.objects.model import read_manifest
    from steer.store.remotes._protocol import Object

    model = pico.save(tmp_path / "model", "llama")
    (model / "README.md").write_text("# A model")
    for name in ("pack", "again"):
        assert steer("export", model, "--modelpack", "-o", tmp_path / name, "--tag", "v1", "--name", "pico")[0] == 0
    pack = layout.Store(tmp_path / "pack", tmp_path / "pack")
    (listed,) = json.loads((pack.root / "index.json").read_text())["manifests"]
    assert (pack.root / "index.json").read_bytes() == (tmp_path / "again" / "index.json").read_bytes()
    assert (listed["artifactType"], listed["annotations"]) == (
        "application/vnd.cncf.model.manifest.v1+json", {"org.opencontainers.image.ref.name": "v1"},
    )  # fmt: skip
    value = read_manifest(pack, listed["digest"], listed["artifactType"])
    config = blobs.read_json(pack, value["config"]["digest"])
    assert value["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert config["descriptor"] == {"name": "pico", "family": "llama"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in value["layers"]]}
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in value["layers"]}
    assert kinds["model.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["README.md"] == "application/vnd.cncf.model.doc.v1.raw"
    remote = open_remote(f"oci://{registry}/packs", "pico")
    for part in (value["config"], *value["layers"]):
        remote.put(Object(part["digest"], part["size"], part["mediaType"], False), blobs.path_of(pack, part["digest"]))
    remote._put_manifest("v1", blobs.read(pack, listed["digest"]), value["mediaType"])
    client = oras.client.OrasClient(hostname=registry, insecure=True)
    client.pull(target=f"{registry}/packs/pico:v1", outdir=str(tmp_path / "pulled"))
    for path in model.iterdir():
        assert digest_file(tmp_path / "pulled" / path.name) == digest_file(path)
    assert steer("export", tmp_path / "pulled" / "nothing", "--modelpack", "-o", tmp_path / "none")[0] == 2
    assert not (tmp_path / "none").exists()


def test_the_hub_shows_the_card_and_the_vectors_of_the_newest_version(store, hub):
    push(store, "hf://user/tone")
    files = hub.repositories["user/tone"][-1]
    assert b"base_model: pico" in files["README.md"]
    assert files["warm.safetensors"] == (store.work / "warm.safetensors").read_bytes()
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}


def test_of_two_pushes_to_the_hub_at_once_one_is_refused(store, hub, tmp_path):
    push(store, "hf://user/tone")
    late = open_remote("hf://user/tone", "tone")
    late.names()
    commit(store, "Calm", calm=0.5)
    push(store, "hf://user/tone")
    with pytest.raises(OutputError, match="can't be used"):
        late.point({"tone": names.resolve(store, "tone:v1")}, {}, {}, {})
    assert hub.refused == 1


def test_a_remote_that_can_not_be_reached_is_one_error(store):
    for url in ("oci://127.0.0.1:9/team", "nonsense://x/y", "oci://", "hf://only-one-part"):
        with pytest.raises((OutputError, UsageError)):
            push(store, url)


def test_the_folder_of_a_remote_is_an_oci_layout(store, tmp_path):
    url = tmp_path / "remote"
    push(store, str(url))
    assert json.loads((url / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    for each in json.loads((url / "index.json").read_text())["manifests"]:
        assert (url / "blobs" / "sha256" / each["digest"].removeprefix("sha256:")).stat().st_size == each["size"]
    assert not [path for path in Path(url).rglob("*partial*")]
    assert layout.FILE not in os.listdir(url)
