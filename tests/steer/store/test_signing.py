"""Signatures: ours verify with the command of model-signing and theirs with ours; a changed file is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
from personalities import commit, new_store

from steer.store import referrers, signing
from steer.store.objects.model import read_commit
from steer.store.using.realise import build, problems_of_build
from steer.store.verify import verify
from vectors.errors import ArtifactError, OutputError, UsageError

pytest.importorskip("model_signing")


@pytest.fixture
def keys(tmp_path):
    public = signing.new_key(tmp_path / "signer.pem")
    return tmp_path / "signer.pem", public


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    (folder / "sub" / "config.json").write_text("{}")
    return folder


def command(*words: object) -> int:
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True).returncode


def test_a_private_key_is_its_owners_and_is_never_replaced(keys, tmp_path):
    assert keys[0].stat().st_mode & 0o077 == 0
    with pytest.raises(OutputError, match="exists"):
        signing.new_key(keys[0])


@pytest.mark.parametrize("change", ["content", "added", "removed"])
def test_a_folder_that_was_changed_is_refused(keys, model, change):
    bundle = model / signing.BUNDLE
    signing.sign_folder(model, keys[0], bundle)
    signing.verify_folder(model, keys[1], bundle)
    if change == "content":
        (model / "weights.safetensors").write_bytes(b"others!")
    elif change == "added":
        (model / "more.bin").write_bytes(b"x")
    else:
        (model / "sub" / "config.json").unlink()
    with pytest.raises(ArtifactError, match="does not match"):
        signing.verify_folder(model, keys[1], bundle)


def test_the_signature_of_another_key_is_refused(keys, model, tmp_path):
    bundle = model / signing.BUNDLE
    signing.sign_folder(model, keys[0], bundle)
    other = signing.new_key(tmp_path / "other.pem")
    with pytest.raises(ArtifactError, match="does not match"):
        signing.verify_folder(model, other, bundle)
    with pytest.raises(UsageError, match="the public key"):
        signing.verify_folder(model, tmp_path / "none.pub", bundle)


@pytest.mark.slow
def test_bundles_verify_in_both_directions_with_the_command_of_model_signing(keys, model, tmp_path):
    ours = tmp_path / "ours.sig"
    signing.sign_folder(model, keys[0], ours)
    assert command("verify", "key", model, "--signature", ours, "--public_key", keys[1]) == 0
    theirs = tmp_path / "theirs.sig"
    assert command("sign", "key", model, "--signature", theirs, "--private_key", keys[0]) == 0
    signing.verify_folder(model, keys[1], theirs)
    (model / "weights.safetensors").write_bytes(b"others!")
    assert command("verify", "key", model, "--signature", ours, "--public_key", keys[1]) != 0


def test_the_signature_of_a_version_is_attached_to_its_composition(keys, tmp_path):
    store = new_store(tmp_path / "tone")
    digest = commit(store, "Warm", warm=1.2)
    with pytest.raises(ArtifactError, match="has no signature"):
        signing.verify_version(store, "tone", keys[1])
    signing.sign_version(store, "tone", keys[0])
    assert signing.verify_version(store, "tone", keys[1]) == 1
    composition = read_commit(store, digest).composition
    assert [each.kind for each in referrers.of(store, composition)] == [referrers.SIGNATURE]
    assert not verify(store).problems
    other = signing.new_key(tmp_path / "other.pem")
    with pytest.raises(ArtifactError, match="does not match"):
        signing.verify_version(store, "tone", other)


def test_a_folder_that_is_not_what_its_version_builds_is_named_file_by_file(tmp_path):
    from steer.store.objects.model import read_composition

    store = new_store(tmp_path / "tone")
    digest = commit(store, "Warm", warm=1.2)
    folder = tmp_path / "built"
    build(store, read_composition(store, read_commit(store, digest).composition), folder)
    assert problems_of_build(store, digest, folder) == []
    (folder / "expression.json").write_text("{}")
    (folder / "more").write_text("")
    problems = problems_of_build(store, digest, folder)
    assert len(problems) == 2
    assert any("expression.json has other bytes" in problem for problem in problems)
