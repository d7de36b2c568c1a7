"""Promotions, what is attached to a composition, and a version as files."""

from __future__ import annotations

import json

import pytest
from personalities import commit, new_store

from steer.store import blobs, gc, names, referrers, refs
from steer.store.objects.model import read_commit, read_composition
from steer.store.using.promote import promote
from steer.store.using.realise import build, realise
from steer.store.verify import verify
from vectors.errors import OutputError, UsageError
from vectors.storage.files import digest_file


@pytest.fixture
def store(tmp_path):
    return new_store(tmp_path / "tone")


def evaluation(outcome: str, low: float, suite: str = "warm") -> bytes:
    metric = {"metric": "margin", "effect": {"mean": low + 0.1, "low": low, "high": low + 0.2}}
    subjects = [{"subject": "x", "outcome": outcome, "metrics": [metric]}]
    return json.dumps({"schema": 1, "suite": {"name": suite, "digests": {}}, "subjects": subjects}).encode()


def attach(store, commit_digest: str, content: bytes) -> str:
    composition = read_commit(store, commit_digest).composition
    return referrers.attach(store, composition, referrers.EVALUATION, {"report.json": content})


def test_a_promotion_needs_the_evaluation_that_it_is_asked_for(store):
    digest = commit(store, "Warm", warm=1.2)
    with pytest.raises(OutputError, match="no evaluation is attached"):
        promote(store, "tone", "champion", "x", require_eval=True)
    attach(store, digest, evaluation("does not work", -0.1))
    with pytest.raises(OutputError, match="none of its evaluations says that it works"):
        promote(store, "tone", "champion", "x", require_eval=True)
    assert refs.target(store, refs.alias("tone", "champion")) is None
    attach(store, digest, evaluation("works", 0.3))
    alias, to, before = promote(store, "tone", "champion", "x", require_eval=True)
    assert (str(alias), to, before) == ("tone@champion", digest, None)
    with pytest.raises(UsageError, match="already"):
        promote(store, "tone", "champion", "x")
    refs.undo(store, "undo")
    assert refs.target(store, refs.alias("tone", "champion")) is None


def test_the_thresholds_of_a_version_are_met_before_it_is_promoted(store):
    store.file.write_text(
        store.file.read_text() + "evals:\n- suite: suites/warm.yaml\n  minimum: 0.2\n- suite: tact.yaml\n"
    )
    digest = commit(store, "Warm", warm=1.2)
    attach(store, digest, evaluation("works", 0.1))
    with pytest.raises(OutputError) as error:
        promote(store, "tone", "champion", "x")
    assert len(error.value.problems) == 2
    assert "at best 0.1" in error.value.problems[0]
    assert "tact.yaml" in error.value.problems[1]
    attach(store, digest, evaluation("works", 0.25))
    attach(store, digest, evaluation("works", 0.0, "tact"))
    promote(store, "tone", "champion", "x")
    other = commit(store, "More", warm=3.0)
    with pytest.raises(OutputError, match="no evaluation on the suite"):
        promote(store, "tone", "champion", "x")
    assert promote(store, "tone", "champion", "x", force=True)[1] == other


def test_what_is_attached_changes_no_identity_and_is_kept_and_checked_with_it(store):
    digest = commit(store, "Warm", warm=1.2)
    composition = read_commit(store, digest).composition
    first = attach(store, digest, evaluation("works", 0.3))
    assert attach(store, digest, evaluation("works", 0.3)) == first
    (found,) = referrers.of(store, composition)
    assert found.kind == referrers.EVALUATION
    assert referrers.read_report(store, found)["subjects"]
    gc.collect(store, days=0, fresh=-1)
    assert blobs.has(store, first)
    assert not verify(store).problems
    blobs.path_of(store, found.files["report.json"]).unlink()
    assert any("attached" in problem for problem in verify(store).problems)


def test_what_is_attached_to_a_collected_composition_goes_with_it(store):
    commit(store, "Warm", warm=1.2)
    lost = commit(store, "Lost", formal=1.0)
    attached = attach(store, lost, evaluation("works", 0.3))
    refs.undo(store, "undo")
    gc.collect(store, days=0, fresh=-1)
    assert not blobs.has(store, attached)
    assert not verify(store).problems


def test_a_version_is_an_expression_over_files_of_its_parts(store):
    commit(store, "Warm", warm=1.2, formal=-0.4)
    found = realise(store, "tone")
    assert found.expression == "1.2*warm - 0.4*formal"
    assert {path.stem for path in found.files.values()} == {"warm", "formal"}
    for part in found.personality.parts:
        assert digest_file(found.files[part.name]) == part.digest


def test_the_same_version_builds_the_same_bytes_anywhere(store, tmp_path):
    digest = commit(store, "Warm", warm=1.2, formal=-0.4)
    personality = read_composition(store, read_commit(store, digest).composition)
    build(store, personality, tmp_path / "a")
    other = new_store(tmp_path / "other")
    commit(other, "The same", warm=1.2, formal=-0.4)
    again = read_composition(other, read_commit(other, names.resolve(other, "HEAD")).composition)
    build(other, again, tmp_path / "b")
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
    assert json.loads(a["expression.json"])["expression"] == "1.2*warm - 0.4*formal"
    with pytest.raises(OutputError, match="exists"):
        build(store, personality, tmp_path / "a")


def test_task_vectors_are_merged_into_the_base_the_same_each_time(store, tmp_path):
    import pico

    from merges import api
    from steer.store.working import document

    base, tuned = pico.save(tmp_path / "base", "llama", seed=1), pico.save(tmp_path / "tuned", "llama", seed=2)
    api.diff(str(base), str(tuned), store.work / "poet.safetensors")
    document.edit(store.file, document.with_field(("base",), str(base)))
    digest = commit(store, "Poet", poet=0.5)
    personality = read_composition(store, read_commit(store, digest).composition)
    assert realise(store, "tone").expression is None
    for name in ("a", "b"):
        made = build(store, personality, tmp_path / name)
        assert made["folders"] == [str(tmp_path / name)]
    weights = [digest_file(next((tmp_path / name).glob("*.safetensors"))) for name in "ab"]
    assert weights[0] == weights[1]
    api.apply(str(base), "0.5*poet", tmp_path / "c", vectors={"poet": store.work / "poet.safetensors"})
    assert digest_file(next((tmp_path / "c").glob("*.safetensors"))) == weights[0]
