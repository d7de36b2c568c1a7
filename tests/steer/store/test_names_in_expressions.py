"""Versions of the store in expressions: quoted names that stand for their vectors, strengths and scopes."""

from __future__ import annotations

import pytest
from personalities import commit, new_store, vector

import steer
from steer.store import refs
from steer.store.working import document
from vectors.errors import ArtifactError, ExpressionError, UsageError
from vectors.resolve import compose, expand


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("STEER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    made = new_store(tmp_path)
    first = commit(made, "Warm", warm=1.2, formal=-0.4)
    refs.point(made, {refs.alias("tone", "champion"): first, refs.tag("tone", "v1"): first}, "x")
    commit(made, "Less", warm=0.8)
    return made


def shapes(composition) -> list[tuple[str, float]]:
    return [(term.name.partition(".")[0], round(term.value, 6)) for term in composition.terms]


def test_a_quoted_version_stands_for_its_terms_times_its_strength(store):
    composition, vectors = compose("2*warm - 0.5*'tone@champion' + 'tone:v1'@response")
    assert shapes(composition) == [("warm", 2), ("warm", -0.6), ("formal", 0.2), ("warm", 1.2), ("formal", -0.4)]
    assert [str(term.scope) for term in composition.terms][-2:] == ["@response", "@response"]
    assert set(vectors) == set(composition.names)
    names = [term.name for term in composition.terms]
    assert names[0] == "warm"  # the file beside it, which may be another vector than the version's
    assert names[1].startswith("warm.")
    assert vectors[names[1]].digest == vectors["warm"].digest


def test_a_version_alone_needs_no_quotes(store):
    for text, strengths in (("tone@champion", 1.2), ("tone:v1", 1.2), ("tone", 0.8), ("tone~1", 1.2)):
        assert shapes(steer.compose(text)[0]) == [("warm", strengths), ("formal", -0.4)]
    assert shapes(compose("tone", strength=0.5)[0]) == [("warm", 0.4), ("formal", -0.2)]


def test_bindings_come_before_the_store_and_the_store_before_the_folder(store):
    refs.point(store, {refs.branch("warm"): refs.target(store, refs.branch("tone"))}, "x")
    assert shapes(compose("warm")[0]) == [("warm", 0.8), ("formal", -0.4)]
    assert shapes(compose("warm", {"warm": store.work / "calm.safetensors"})[0]) == [("warm", 1.0)]
    assert shapes(compose("warm.safetensors")[0]) == [("warm", 1.0)]  # a path is a path
    assert shapes(compose("calm")[0]) == [("calm", 1.0)]


def test_the_same_version_later_is_the_same_composition_and_another_is_not(store):
    fixed, moved = compose("'tone:v1'")[0], compose("'tone@champion'")[0]
    assert fixed.digest == moved.digest
    vector(store.work / "warm.safetensors", 99)
    new = commit(store, "Another warm")
    refs.point(store, {refs.alias("tone", "champion"): new}, "x")
    assert compose("'tone:v1'")[0].digest == fixed.digest
    assert compose("'tone@champion'")[0].terms[0].name != moved.terms[0].name


def test_what_a_version_can_not_be_is_refused_with_a_next_step(store):
    for text, problem in (
        ("ablate('tone:v1')", "ablate takes one vector"),
        ("'tone:v1'[2]", "layers are given for one vector"),
        ("'tone@champoin'", "is not bound"),
        ("'bbbbbb@x'", "is not bound"),
    ):
        with pytest.raises(ExpressionError, match=problem):
            compose(text)
    with pytest.raises(ExpressionError) as error:
        compose("warm + tone@champion")
    assert "'tone@champion'" in error.value.hint
    with pytest.raises(ExpressionError) as error:
        compose("warm + tone:v1")
    assert "'tone:v1'" in error.value.hint
    document.set_part(store.file, "warm", {"scope": "response"})
    commit(store, "In responses")
    with pytest.raises(ExpressionError, match="have scopes already"):
        compose("'HEAD'@first:4")
    assert "@response" in str(compose("'HEAD'")[0])


def test_a_version_that_changes_the_weights_is_no_vector(store, tmp_path):
    import pico

    from merges import api

    base, tuned = pico.save(tmp_path / "base", "llama", seed=1), pico.save(tmp_path / "tuned", "llama", seed=2)
    api.diff(str(base), str(tuned), store.work / "poet.safetensors")
    document.edit(store.file, document.without_part("warm"))
    document.edit(store.file, document.without_part("formal"))
    document.edit(store.file, document.with_field(("base",), str(base)))
    commit(store, "Poet", poet=0.5)
    with pytest.raises(UsageError, match="changes the weights by poet") as error:
        compose("'tone'")
    assert "steer build tone" in error.value.hint


def test_a_damaged_version_is_an_error_and_not_an_unknown_name(store):
    from steer.store import blobs

    digest = refs.target(store, refs.tag("tone", "v1"))
    blobs.path_of(store, digest).chmod(0o644)
    blobs.path_of(store, digest).write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="damaged"):
        compose("'tone:v1'")


def test_files_of_a_version_are_given_to_what_needs_files(store):
    composition, files = expand("warm + 'tone:v1'")
    assert set(files) == set(composition.names) - {"warm"}
    assert all(file.is_file() for file in files.values())
