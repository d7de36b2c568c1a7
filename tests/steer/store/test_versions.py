"""Versions of a personality: what is committed comes back, whatever is done with it."""

from __future__ import annotations

import json

import pytest
from personalities import commit, new_store, vector

from steer.store import blobs, combine, layout, names, refs
from steer.store.history.blame import blame
from steer.store.history.differences import compare, summary
from steer.store.history.walk import merge_base, walk
from steer.store.objects.model import read_commit, read_composition
from steer.store.working import document, folder, parts, settings
from steer.store.working.checkout import checkout
from vectors.errors import ArtifactError, ModelError, OutputError, UsageError
from vectors.storage.files import digest_file


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_AUTHOR", "Ana")
    monkeypatch.delenv("STEER_HOME", raising=False)
    return new_store(tmp_path / "tone")


def expression(store, version: str = "HEAD") -> str:
    digest = names.resolve(store, version)
    return str(read_composition(store, read_commit(store, digest).composition).expression())


def test_the_same_recipe_made_twice_is_one_composition(store, tmp_path):
    first = read_commit(store, commit(store, "Warm", warm=1.2))
    other = new_store(tmp_path / "other", "different-name")
    second = read_commit(other, commit(other, "Quite another message", warm=1.2))
    assert first.composition == second.composition
    assert first.digest != second.digest
    assert first.author == "Ana"


def test_comments_and_order_are_no_part_of_a_composition_but_come_back_with_a_commit(store):
    first = commit(store, "Warm", warm=1.2)
    store.file.write_text("# mine\n" + store.file.read_text().replace("strength: 1.2", "strength: 1.20  # just right"))
    assert not folder.status(store).difference
    with pytest.raises(UsageError, match="nothing has changed"):
        folder.commit(store, "Again", "")
    commented = folder.commit(store, "Comments", "", allow_empty=True)
    assert commented.composition == read_commit(store, first).composition
    text = store.file.read_text()
    checkout(store, first, "before", "", create=True)
    assert "# mine" not in store.file.read_text()
    checkout(store, commented.digest, "tone", "")
    assert store.file.read_text() == text


def test_edits_keep_comments_and_order(store):
    store.file.write_text(
        "base: pico  # the base\nparts:\n- name: warm  # the first\n  strength: 1.0\n\n"
        "# the second\n- {name: formal, strength: 2}\n"
    )
    settings.apply(store, ["warm.strength=0.8", "formal.scope=response", "serve.temperature=0.7", "warm.layers=1-2"])
    text = store.file.read_text()
    assert "# the base" in text
    assert "# the first" in text
    assert text.index("# the second") < text.index("formal")
    assert "strength: 0.8" in text
    assert "{name: formal, strength: 2, scope: response}" in text
    assert document.read(store.file).serve == {"temperature": 0.7}
    settings.apply(store, ["formal.scope=", "serve.temperature="])
    assert document.read(store.file).parts[1].scope is None


def test_all_problems_of_settings_and_of_the_file_are_reported_at_once(store):
    commit(store, "Warm", warm=1.2)
    before = store.file.read_text()
    with pytest.raises(UsageError) as error:
        settings.apply(store, ["wram.strength=1", "warm.colour=1", "nonsense", "warm.strength=2"])
    assert len(error.value.problems) == 3
    assert "warm" in error.value.problems[0]
    with pytest.raises(ArtifactError, match="not a finite number"):
        settings.apply(store, ["serve.temperature=0.5", "warm.strength=often"])
    assert store.file.read_text() == before
    store.file.write_text(
        "bsae: x\nparts:\n- {name: a, strength: x, layers: 3-1}\n- {name: a, scope: never, colour: red}\n"
    )
    with pytest.raises(ArtifactError) as error:
        document.read(store.file)
    text = "\n".join(error.value.problems)
    for word in ("bsae", "base is missing", "strength", "layers", "scope", "colour"):
        assert word in text


def test_the_expression_says_what_the_parts_do(store):
    folder.add(store, store.work / "warm.safetensors", None, {"strength": 1.2})
    folder.add(store, store.work / "formal.safetensors", None, {"strength": -0.4, "scope": "response", "layers": "1-2"})
    folder.add(store, store.work / "calm.safetensors", "very-calm", {"operation": "ablate"})
    commit(store, "All")
    assert expression(store) == "1.2*warm - 0.4*formal[1-2]@response + ablate('very-calm')"
    settings.apply(store, ["warm.condition=when:formal>0.5@while:very<-1", "warm.scope=first:8"])
    commit(store, "Conditional")
    assert expression(store).startswith("1.2*warm@first:8@when:formal>0.5@while:very<-1 - 0.4*formal[1-2]@response")
    for condition in ("anger>0.5", "response", "when:anger", "first:8@when:a>1"):
        with pytest.raises(ArtifactError, match="not a condition such as when:anger"):
            settings.apply(store, [f"warm.condition={condition}"])


def test_a_part_without_a_strength_has_the_recommended_one(store):
    folder.add(store, store.work / "warm.safetensors", None, {})
    commit(store, "Warm")
    assert expression(store) == "1.5*warm"


def test_a_vector_that_changed_is_a_change_and_lock_pins_it(store):
    first = commit(store, "Warm", warm=1.2)
    vector(store.work / "warm.safetensors", 77)
    change = folder.status(store).difference
    assert summary(change).startswith("warm vector")
    second = commit(store, "Another warm")
    assert read_commit(store, first).composition != read_commit(store, second).composition
    folder.lock(store)
    pinned = digest_file(store.work / "warm.safetensors")
    vector(store.work / "warm.safetensors", 78)
    assert parts.read(store)[0].parts[0].digest == pinned
    assert not folder.status(store).difference


def test_a_file_that_is_gone_is_taken_from_the_newest_commit(store):
    commit(store, "Warm", warm=1.2)
    (store.work / "warm.safetensors").unlink()
    assert not folder.status(store).difference
    commit(store, "Less", warm=0.5)
    assert expression(store) == "0.5*warm"


def test_missing_vectors_and_vectors_of_different_models_are_refused(store):
    with pytest.raises(UsageError, match="no wram"):
        commit(store, "x", wram=1.0)
    document.edit(store.file, document.without_part("wram"))
    vector(store.work / "foreign.safetensors", 5, {**BASE_OTHER})
    with pytest.raises(ModelError, match="different models"):
        commit(store, "x", warm=1.0, foreign=1.0)
    assert refs.every(store) == {}


BASE_OTHER = {"digest": "sha256:" + "b" * 64, "architecture": "X", "hidden_size": 8, "layers": 4, "name": "other"}


def test_names(store):
    first = commit(store, "Warm", warm=1.2)
    second = commit(store, "Less", warm=0.8)
    refs.point(store, {refs.tag("tone", "v1"): first, refs.alias("tone", "champion"): second}, "x")
    hexadecimal = second.removeprefix("sha256:")
    for text in (
        "HEAD",
        "",
        "tone",
        "@champion",
        "tone@champion",
        second,
        hexadecimal[:6],
        f"sha256:{hexadecimal[:20]}",
    ):
        assert names.resolve(store, text) == second, text
    for text in ("tone:v1", ":v1", "tone~1", "~1", "tone@champion~", first[7:13]):
        assert names.resolve(store, text) == first, text
    for text, message in (
        ("tune", "Did you mean|tone"), ("tone:v2", "no version"), ("tone~5", "before the first"),
        ("abc", "too short|no version"),
        ("../../etc/passwd", "no version"), ("sha256:" + "0" * 64, "no version"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            names.resolve(store, text)


def test_an_ambiguous_prefix_lists_the_candidates(store, monkeypatch):
    found = [commit(store, f"Version {i}", warm=float(i + 1)) for i in range(3)]
    monkeypatch.setattr(names, "_with_prefix", lambda _store, _digits: found)
    with pytest.raises(UsageError, match="beginning of 3 commits") as error:
        names.resolve(store, "abcdef")
    assert all(names.blobs_short(digest) in str(error.value) for digest in found)


@pytest.mark.parametrize("name", ["Tone", "a/b", "..", "", "tone ", "-x", "a" * 200, "tone\n"])
def test_a_name_that_no_registry_takes_is_refused(name):
    with pytest.raises(UsageError, match="can't be a name"):
        refs.branch(name)


def test_the_store_is_an_oci_layout_that_lists_its_names(store):
    digest = commit(store, "Warm", warm=1.2)
    assert json.loads((store.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (listed,) = json.loads((store.root / "index.json").read_text())["manifests"]
    assert listed["digest"] == digest
    assert listed["annotations"]["org.opencontainers.image.ref.name"] == "tone"
    manifest = json.loads(blobs.path_of(store, digest).read_bytes())
    titles = {each["annotations"]["org.opencontainers.image.title"]: each for each in manifest["layers"]}
    assert set(titles) == {"warm.safetensors", "personality.yaml", "README.md"}
    assert titles["warm.safetensors"]["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    assert titles["warm.safetensors"]["digest"] == digest_file(store.work / "warm.safetensors")
    for each in (manifest["config"], manifest["subject"], *manifest["layers"]):
        path = blobs.path_of(store, each["digest"])
        assert digest_file(path) == each["digest"]
        assert path.stat().st_size == each["size"]


def test_the_store_is_found_upward_and_by_its_variable(store, tmp_path, monkeypatch):
    deep = store.work / "a" / "b"
    deep.mkdir(parents=True)
    assert layout.find(deep) == store
    assert layout.find(tmp_path) is None
    with pytest.raises(UsageError, match="no store"):
        layout.require(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(store.root))
    assert layout.find(tmp_path).root == store.root
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="is not a store"):
        layout.find(tmp_path)


def test_a_branch_keeps_its_own_line_and_merges_back(store):
    commit(store, "Warm", warm=1.2)
    base = commit(store, "Formal", formal=-0.4)
    checkout(store, base, "calmer", "", create=True)
    theirs = commit(store, "Calm", calm=0.5)
    checkout(store, names.resolve(store, "tone"), "tone", "")
    ours = commit(store, "Less warm", warm=0.8)
    assert merge_base(store, ours, theirs) == base
    made = combine.merge_commit(store, theirs, "calmer", "", "").commit
    assert made.parents == (ours, theirs)
    assert expression(store) == "0.8*warm - 0.4*formal + 0.5*calm"
    assert not folder.status(store).difference
    assert next(walk(store, [made.digest])).digest == made.digest
    assert combine.merge_commit(store, theirs, "calmer", "", "").commit is None
    assert {part: each.digest for part, each in blame(store, made.digest).items()}["calm"] == theirs


def test_a_merge_without_own_changes_moves_forward(store):
    base = commit(store, "Warm", warm=1.2)
    checkout(store, base, "calmer", "", create=True)
    theirs = commit(store, "Calm", calm=0.5)
    checkout(store, base, "tone", "")
    result = combine.merge_commit(store, theirs, "calmer", "", "")
    assert result.forward
    assert names.resolve(store, "tone") == theirs
    assert not folder.status(store).difference


def test_what_changed_on_both_sides_is_a_conflict_and_never_averaged(store):
    base = commit(store, "Warm", warm=1.0)
    checkout(store, base, "other", "", create=True)
    theirs = commit(store, "More", warm=2.0)
    checkout(store, base, "tone", "")
    commit(store, "Less", warm=0.5)
    before = store.file.read_text()
    with pytest.raises(OutputError, match="warm changed on both sides"):
        combine.merge_commit(store, theirs, "other", "", "")
    assert store.file.read_text() == before
    combine.merge_commit(store, theirs, "other", "", "", take="theirs")
    assert expression(store) == "2*warm"


def test_a_revert_takes_back_one_commit_and_keeps_the_later_ones(store):
    commit(store, "Warm", warm=1.2)
    middle = commit(store, "Formal", formal=-0.4)
    commit(store, "Calm", calm=0.5)
    combine.revert(store, middle, "", "")
    assert expression(store) == "1.2*warm + 0.5*calm"
    combine.revert(store, names.resolve(store, "HEAD"), "", "")
    assert expression(store) in ("1.2*warm + 0.5*calm - 0.4*formal", "1.2*warm - 0.4*formal + 0.5*calm")


def test_a_revert_of_what_was_changed_again_is_a_conflict(store):
    commit(store, "Warm", warm=1.2)
    middle = commit(store, "Less", warm=0.8)
    commit(store, "Least", warm=0.1)
    with pytest.raises(OutputError, match="both sides"):
        combine.revert(store, middle, "", "")


def test_a_checkout_loses_nothing_that_is_in_no_commit(store):
    first = commit(store, "Warm", warm=1.2)
    commit(store, "Less", warm=0.8)
    settings.apply(store, ["warm.strength=0.3"])
    with pytest.raises(OutputError, match="in no commit"):
        checkout(store, first, "before", "", create=True)
    settings.apply(store, ["warm.strength=0.8"])
    document.set_part(store.file, "warm", {"digest": parts.read(store)[0].parts[0].digest})
    vector(store.work / "warm.safetensors", 99)  # of no part now, and in no commit
    assert not folder.status(store).difference
    with pytest.raises(OutputError, match="would be overwritten"):
        checkout(store, first, "before", "", create=True)
    checkout(store, first, "before", "", create=True, force=True)
    assert expression(store) == "1.2*warm"


def test_every_move_can_be_undone_back_to_the_start(store):
    first = commit(store, "Warm", warm=1.2)
    refs.point(store, {refs.tag("tone", "v1"): first}, "tag")
    commit(store, "Less", warm=0.8)
    checkout(store, first, "other", "", create=True)
    refs.point(store, {refs.tag("tone", "v1"): None}, "delete", force=True)
    for _ in range(5):
        refs.undo(store, "undo")
    assert refs.every(store) == {}
    assert refs.current(store) == "tone"
    with pytest.raises(UsageError, match="no move to undo"):
        refs.undo(store, "undo")


def test_a_tag_does_not_move(store):
    first = commit(store, "Warm", warm=1.2)
    tag = refs.tag("tone", "v1")
    refs.point(store, {tag: first}, "tag")
    second = commit(store, "Less", warm=0.8)
    with pytest.raises(OutputError, match="the tag tone:v1 exists"):
        refs.point(store, {tag: second}, "tag")
    assert refs.target(store, tag) == first
    refs.point(store, {tag: second}, "tag", force=True)
    assert refs.target(store, tag) == second


def test_a_large_blob_is_linked_and_a_small_one_copied(store, tmp_path, monkeypatch):
    content = tmp_path / "content"
    content.write_bytes(b"x" * 1000)
    digest = blobs.put_file(store, content)
    blobs.take(store, digest, tmp_path / "small")
    assert (tmp_path / "small").stat().st_ino != blobs.path_of(store, digest).stat().st_ino
    monkeypatch.setattr(blobs, "COPIED", 10)
    blobs.take(store, digest, tmp_path / "large")
    assert (tmp_path / "large").stat().st_ino == blobs.path_of(store, digest).stat().st_ino
    assert not (tmp_path / "large").stat().st_mode & 0o222
    before = blobs.path_of(store, digest).stat().st_ino
    assert blobs.put_file(store, content) == digest
    assert blobs.path_of(store, digest).stat().st_ino == before


@pytest.mark.parametrize(
    "digest", ["sha256:../../x", "sha256:" + "g" * 64, "md5:" + "0" * 32, "", "sha256:" + "0" * 63]
)
def test_a_digest_is_checked_before_it_touches_a_path(store, digest):
    with pytest.raises(ArtifactError, match="not a digest"):
        blobs.path_of(store, digest)


def test_a_change_is_described_in_one_line(store):
    commit(store, "Warm", warm=1.2, calm=1.0)
    before = parts.read(store)[0]
    settings.apply(store, ["warm.strength=0.8", "serve.temperature=0.5"])
    document.edit(store.file, document.without_part("calm"))
    document.set_part(store.file, "formal", {"strength": -0.4, "scope": "response"})
    assert summary(compare(before, parts.read(store)[0])) == (
        "warm 1.2 → 0.8, - calm, + formal -0.4 @response, serve.temperature none → 0.5".replace("none", "default")
    )
