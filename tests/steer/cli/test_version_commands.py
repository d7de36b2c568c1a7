"""The commands of the store, typed as a new user would type them."""

from __future__ import annotations

import json

import pytest
from personalities import NAMES, vector

from steer.evaluation.arms.subjects import subjects_of
from steer.store import layout, names, referrers
from steer.store.objects.model import read_commit
from vectors.errors import UsageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_AUTHOR", "Ana")
    monkeypatch.delenv("STEER_HOME", raising=False)
    for seed, name in enumerate(NAMES):
        vector(tmp_path / f"{name}.safetensors", seed)
    return tmp_path


def test_a_first_session(steer, here):
    assert steer("init", "tone", "--base", "pico")[0] == 0
    assert steer("add", "warm.safetensors", "--strength", "1.2")[1] == "added warm: strength 1.2\n"
    assert "+ warm" in steer("status")[1]
    assert steer("commit", "-m", "Warm")[0] == 0
    assert "nothing to commit" in steer("status")[1]
    steer("add", "formal.safetensors", "--strength=-0.4", "--scope", "response")
    code, text, _ = steer("diff", "--exit-code")
    assert (code, text.startswith("+ formal")) == (1, True)
    steer("commit", "-m", "A little formal")
    steer("tag", "v1")
    steer("set", "warm.strength=0.8")
    assert steer("diff")[1] == "~ warm  strength 1.2 → 0.8\n"
    steer("commit", "-m", "Less warm")
    log = steer("log")[1]
    for words in ("(*tone)", "Less warm", "warm 1.2 → 0.8", "(:v1)", "+ formal -0.4 @response", "Ana", "+ warm 1.2"):
        assert words in log
    assert log.index("Less warm") < log.index("A little formal") < log.index("+ warm 1.2")
    assert steer("diff", "tone:v1", "tone", "--exit-code")[0] == 1
    assert steer("checkout", ":v1", "-b", "calmer")[0] == 0
    steer("add", "calm.safetensors")
    steer("commit", "-m", "Calm")
    steer("checkout", "tone")
    assert "Merge calmer" in steer("merge", "calmer")[1]
    assert "calmer is merged already" in steer("merge", "calmer")[1]
    assert steer("revert", "tone~2")[0] == 0
    assert "undone: steer" in steer("undo")[1]
    assert "is whole" in steer("verify")[1]
    assert steer("blame", "calm")[1].count("Calm") == 1
    assert steer("gc")[1].startswith("would remove")
    assert steer("build", "tone:v1", "-o", "built")[0] == 0
    assert "is what tone:v1 builds" in steer("verify", "tone:v1", "--rebuild", "built")[1]
    assert steer("push", here / "remote")[0] == 0
    assert "0 objects" in steer("pull", here / "remote", "--force")[1]


def test_every_command_of_the_store_prints_one_json_object(steer, here):
    steer("init", "tone", "--base", "pico")
    steer("add", "warm.safetensors")
    for words in (
        ["status"], ["commit", "-m", "Warm"], ["log"], ["log", "--moves"], ["show"], ["diff"], ["blame"], ["verify"],
        ["gc"], ["tag", "v1"], ["lock"], ["promote"], ["set", "warm.strength=2"], ["commit", "-m", "More"],
        ["checkout", ":v1", "-b", "b"], ["checkout", "tone"], ["merge", "b"], ["revert"], ["undo"],
        ["push", str(here / "remote")], ["build", "-o", "built"], ["rm", "warm"],
    ):  # fmt: skip
        code, text, err = steer(*words, "--json")
        assert code == 0, (words, err)
        assert isinstance(json.loads(text), dict), words


def test_without_a_store_every_command_says_how_to_make_one(steer, here):
    for words in (["status"], ["log"], ["commit", "-m", "x"], ["push", "x"], ["promote"], ["gc"], ["undo"], ["diff"]):
        code, _, err = steer(*words)
        assert code == 2, words
        assert "there is no store here" in err


def test_a_promotion_is_gated_and_a_champion_is_an_arm(steer, here):
    steer("init", "tone", "--base", "pico")
    steer("add", "warm.safetensors", "--strength", "1.2")
    steer("commit", "-m", "Warm")
    code, _, err = steer("promote", "--require-eval")
    assert code == 1
    assert "no evaluation is attached" in err
    store = layout.require()
    report = {"schema": 1, "subjects": [{"subject": "x", "outcome": "works", "metrics": []}]}
    folder = here / "eval"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    assert steer("attach", "tone", folder)[0] == 0
    assert "tone@champion is" in steer("promote", "--require-eval")[1]
    composition = read_commit(store, names.resolve(store, "@champion")).composition
    assert len(referrers.of(store, composition, referrers.EVALUATION)) == 1

    from steer.cli import versions
    from steer.cli.commands.serve import Request, _with_versions
    from steer.evaluation.request import Request as EvaluationRequest

    steer("set", "warm.strength=0.8")
    steer("commit", "-m", "Less")
    steer("promote", "--to", "challenger")
    served, followed = _with_versions(Request(model="tone@champion", challenger=("tone@challenger",)))
    assert {arm: each["name"] for arm, each in followed.items()} == {
        "champion": "tone@champion",
        "challenger": "tone@challenger",
    }
    assert _with_versions(Request(model="tone"))[1] == {}  # a branch moves with every commit, so it is not followed
    assert served.model == "pico"
    (name,) = served.vectors
    assert served.arms == {"champion": f"1.2*{name}", "challenger": f"0.8*{name}"}
    assert name.startswith("warm.")
    assert _with_versions(Request(model="pico")) == (Request(model="pico"), {})
    request, digests = versions.with_versions(EvaluationRequest(subjects=("tone@champion", "prompt:tone", "warm")))
    assert request.subjects == (f"1.2*{name}", "prompt:tone", "warm")
    assert digests == {"tone@champion": composition}
    assert request.subject_names == {f"1.2*{name}": "tone@champion"}
    subject, _ = subjects_of(request.subjects[:2], request.vectors, names=request.subject_names)
    assert (subject.name, subject.arm.name, str(subject.arm.composition)) == (*2 * ("tone@champion",), f"1.2*{name}")
    with pytest.raises(UsageError, match=r"tone@champion and tone~1 are versions of one composition, 1\.2"):
        versions.with_versions(EvaluationRequest(subjects=("tone@champion", "tone~1", "tone@challenger")))
