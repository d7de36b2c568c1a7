"""What differs in behaviour between two versions, and which version broke a trait."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from personalities import commit, new_store, vector

from steer.store import names, referrers
from steer.store.history import behaviour, bisect
from steer.store.history.differences import PartChange, tensors_of
from steer.store.objects.model import TASK, Part, read_commit
from vectors.errors import ArtifactError, UsageError
from vectors.storage.files import digest_file


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("STEER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return new_store(tmp_path)


def attach(store, version: str, figures: list[float], *, group: str | None = None, digests: dict | None = None) -> str:
    """Attach an evaluation in which the base has 0, 1, 2, … and the version these figures more."""
    base = [float(i) for i in range(len(figures))]
    items = [{"item": f"i{i}", "metric": "margin", "group": group and f"{group}{i % 4}"} for i in range(len(figures))]
    value = {
        "schema": 1, "suite": "warm", "digests": digests or {"warm.yaml": "sha256:" + "b" * 64}, "model": "m",
        "items": items, "base": base, "subject": [b + f for b, f in zip(base, figures, strict=True)],
    }  # fmt: skip
    report = {"schema": 1, "suite": {"name": "warm", "digests": {}}, "subjects": [{"outcome": "works", "metrics": []}]}
    composition = read_commit(store, names.resolve(store, version)).composition
    files = {"report.json": json.dumps(report).encode(), behaviour.ITEMS: json.dumps(value).encode()}
    return referrers.attach(store, composition, referrers.EVALUATION, files)


def compared(store):
    digests = [read_commit(store, names.resolve(store, text)).composition for text in ("HEAD~1", "HEAD")]
    return behaviour.compare(store, *digests)


def test_two_versions_are_compared_in_pairs_on_the_items_that_both_were_evaluated_on(store):
    commit(store, "Warm", warm=1.0)
    commit(store, "Warmer", warm=2.0)
    # The items differ far more among themselves than the versions do: only pairs show the change.
    before = [10.0 * math.sin(i) for i in range(40)]
    attach(store, "HEAD~1", before)
    attach(store, "HEAD", [each + 0.5 + 0.01 * (i % 3) for i, each in enumerate(before)][:36])
    (each,) = compared(store)
    assert each.change.items == 36
    assert each.change.mean == pytest.approx(0.51, abs=0.001)
    assert 0.5 < each.change.low < each.change.high < 0.52
    assert each.sentence() == "more of the behaviour"
    assert each.after.mean - each.before.mean == pytest.approx(each.change.mean)
    assert behaviour.value_of(each)["change"]["items"] == 36


def test_the_newest_evaluation_counts_and_few_items_give_no_verdict(store):
    commit(store, "Warm", warm=1.0)
    commit(store, "Warmer", warm=2.0)
    attach(store, "HEAD~1", [1.0] * 8)
    attach(store, "HEAD", [5.0] * 8)
    attach(store, "HEAD", [0.0] * 8)
    (each,) = compared(store)
    assert each.change.mean == -1
    assert "no verdict: there are only 8 items" in each.sentence()


def test_items_of_one_template_are_resampled_together(store):
    commit(store, "Warm", warm=1.0)
    commit(store, "Warmer", warm=2.0)
    for version, factor in (("HEAD~1", 0.0), ("HEAD", 1.0)):
        attach(store, version, [factor * (i % 4) for i in range(40)], group="template")
    assert compared(store)[0].change.clusters == 4
    assert "no verdict: the items belong to 4 groups" in compared(store)[0].sentence()


def test_other_suites_are_listed_and_not_compared(store):
    commit(store, "Warm", warm=1.0)
    commit(store, "Warmer", warm=2.0)
    attach(store, "HEAD~1", [1.0] * 40)
    attach(store, "HEAD", [1.0] * 40, digests={"other.yaml": "sha256:" + "c" * 64})
    assert [(each.before is None, each.after is None, each.change) for each in compared(store)] == [
        (False, True, None),
        (True, False, None),
    ]


def test_damaged_figures_are_named(store):
    commit(store, "Warm", warm=1.0)
    composition = read_commit(store, names.resolve(store, "HEAD")).composition
    files = {"report.json": b"{}", behaviour.ITEMS: b'{"schema": 1, "items": 5}'}
    referrers.attach(store, composition, referrers.EVALUATION, files)
    with pytest.raises(ArtifactError, match="items is 5"):
        behaviour.evaluations_of(store, composition)


@pytest.mark.slow
def test_a_replaced_task_vector_is_compared_parameter_by_parameter(store, tmp_path):
    import pico

    from merges import api
    from steer.store import blobs

    base = pico.save(tmp_path / "base", "llama", seed=1)
    parts = []
    for seed in (2, 3):
        tuned = pico.save(tmp_path / f"tuned{seed}", "llama", seed=seed)
        file = tmp_path / f"poet{seed}.safetensors"
        api.diff(str(base), str(tuned), file)
        parts.append(Part("poet", blobs.put_file(store, file), file.stat().st_size, TASK))
    rows = tensors_of(store, PartChange("poet", parts[0], parts[1]))
    assert len(rows) > 5
    assert all(-1 <= row["cosine"] <= 1 and row["max_change"] > 0 for row in rows)
    assert tensors_of(store, PartChange("poet", parts[0], replace(parts[0], strength=2.0))) == []


def test_bisect_finds_the_commit_that_broke_it_in_few_measurements(store):
    commits = [commit(store, str(i), warm=float(i)) for i in range(12)]
    line = bisect.between(store, commits[0], commits[-1])
    assert line == commits
    for broken in (1, 7, 11):
        measured: list[str] = []

        def measure(digest: str, broken: int = broken, measured: list[str] = measured) -> float:
            measured.append(digest)
            return 1.0 if line.index(digest) < broken else 0.2

        found = bisect.search(line, measure)
        assert (found.broken, found.last_good) == (commits[broken], commits[broken - 1])
        assert len(measured) == len(set(measured)) <= 7
    with pytest.raises(UsageError, match="not lost between them"):
        bisect.search(line, lambda digest: 1.0)
    with pytest.raises(UsageError, match="is not behind"):
        bisect.between(store, commits[-1], commits[0])


def test_bisect_goes_on_from_the_evaluations_that_are_attached(store, steer, monkeypatch):
    suite = store.work / "warm.yaml"
    pairs = [
        {"kind": "pair", "prompt": "Hi", "positive": f"I am so glad {i}", "negative": f"What {i}"} for i in range(40)
    ]  # fmt: skip
    suite.write_text(json.dumps({"name": "warm", "items": pairs}))
    from steer.evaluation.suites.reading import Sources, read_suite

    digests = dict(read_suite(Sources(suite=suite)).digests)
    commits = [commit(store, f"Step {i}", warm=float(i + 1)) for i in range(6)]
    for i, digest in enumerate(commits):
        attach(store, digest, [1.0 if i < 4 else 0.0] * 30, digests=digests)
    code, text, err = steer("bisect", "--eval", str(suite), "--good", commits[0][7:19])
    assert code == 0, err
    assert f"{commits[4][7:15]} broke it" in text
    assert "Step 4" in text
    assert (
        json.loads(steer("bisect", "--eval", str(suite), "--good", commits[0][7:19], "--json")[1])["broken"]
        == (commits[4])
    )


def test_the_log_reads_each_composition_and_evaluation_once(store, monkeypatch):
    from steer.cli import versions
    from steer.store.history import walk
    from steer.store.objects import model

    read: list[tuple[str, str]] = []

    def counted(kind, function):
        def reading(store, digest, *more):
            read.append((kind, digest))
            return function(store, digest, *more)

        return reading

    digests = [commit(store, str(i), warm=float(i)) for i in range(6)]
    for digest in digests:
        attach(store, digest, [1.0] * 3)
    commits = list(walk.walk(store, [digests[-1]]))
    monkeypatch.setattr(model, "read_composition", counted("composition", model.read_composition))
    monkeypatch.setattr(model, "read_commit", counted("commit", model.read_commit))
    monkeypatch.setattr(behaviour, "evaluations_of", counted("evaluation", behaviour.evaluations_of))
    text = "\n".join(versions.log_lines(store, commits, {}))
    assert text.count("evaluated on warm: margin +1.000") == 6
    assert text.count("+0.000 from the version before") == 5
    assert sorted(kind for kind, _ in read) == ["composition"] * 6 + ["evaluation"] * 6
    assert len(set(read)) == 12


def test_diff_prints_the_behaviour_and_markdown(store, steer):
    commit(store, "Warm", warm=1.0)
    vector(store.work / "warm.safetensors", 9)
    commit(store, "Warmer", warm=2.0)
    assert "neither is evaluated" in steer("diff", "--behaviour")[2]
    attach(store, "HEAD~1", [1.0] * 40)
    attach(store, "HEAD", [2.0] * 40)
    log = steer("log")[1]
    assert "evaluated on warm: margin +2.000, +1.000 from the version before (works)" in log
    assert "evaluated on warm: margin +1.000 (works)" in log
    text = steer("diff", "HEAD~1", "HEAD", "--behaviour")[1]
    assert "+1.000 (+1.000 to +1.000)" in text
    assert "more of the behaviour" in text
    page = steer("diff", "HEAD~1", "HEAD", "--behaviour", "--md")[1]
    assert "### HEAD~1 → HEAD" in page
    assert "| warm | changed | strength 1 → 2; digest" in page
    assert "| layer | cosine | norm ratio |" in page
    assert json.loads(steer("diff", "HEAD~1", "HEAD", "--behaviour", "--json")[1])["behaviour"][0]["suite"] == "warm"
    assert digest_file(store.work / "warm.safetensors")


@pytest.mark.slow
def test_two_versions_answer_the_same_prompts_and_an_evaluation_is_attached_with_its_items(store, steer, tmp_path):
    import pico
    import torch

    from vectors.references import identity, resolve
    from vectors.steering import SteeringVector

    model = pico.save(tmp_path / "model", "llama")
    base = identity(resolve(str(model)))
    directions = {1: torch.randn(base["hidden_size"], generator=torch.Generator().manual_seed(0))}
    SteeringVector(directions, {"base": base, "apply": [1]}).save(store.work / "warm.safetensors")
    store.file.write_text(f"base: {model}\nparts: []\n")
    commit(store, "Warm", warm=0.5)
    commit(store, "Warmer", warm=4.0)
    code, text, err = steer("diff", "-p", "the warm", "--json")
    assert code == 0, err
    (answer,) = json.loads(text)["answers"]
    assert len(set(answer["answers"])) == 2
    words = ["warm", "cold", "the", "and", "a"]
    pairs = [
        {"kind": "pair", "prompt": w, "positive": f"warm {v}", "negative": f"cold {v}"} for w in words for v in words
    ]
    (store.work / "warm.yaml").write_text(json.dumps({"name": "warm", "items": pairs}))
    few = ["--suite", "warm.yaml", "--control", "none", "--max-tokens", "0", "--curve", "1", "--allow-overlap"]
    code, shown, err = steer("eval", "HEAD~1", "HEAD", *few, "-o", "evaluated")
    assert code == 0, err
    assert "\nHEAD~1 " in shown
    assert "\noperating point: 4*warm." in shown
    report = json.loads(Path("evaluated/report.json").read_text())
    assert [subject["subject"] for subject in report["subjects"]] == ["HEAD~1", "HEAD"]
    assert [*store.root.rglob("*.evaluations.json")] == []  # the store keeps its evaluations itself
    (each,) = json.loads(steer("diff", "--behaviour", "--json")[1])["behaviour"]
    assert each["change"]["items"] > 5
    assert each["change"]["mean"] == pytest.approx(each["after"]["mean"] - each["before"]["mean"], abs=1e-6)


@pytest.mark.slow
def test_bisect_evaluates_the_versions_that_it_visits_and_finds_a_planted_break(store, steer, tmp_path):
    import pico
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from vectors.references import identity, resolve
    from vectors.steering import SteeringVector

    model = pico.save(tmp_path / "model", "llama")
    weights, tokenizer = load_file(model / "model.safetensors"), AutoTokenizer.from_pretrained(model)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("warm", "cold")]
    # In the last block: what it adds reaches the logits of the two words and nothing else.
    directions = {pico.LAYERS - 1: head[ids[0]] - head[ids[1]]}
    base = identity(resolve(str(model)))
    SteeringVector(directions, {"base": base, "apply": list(directions)}).save(store.work / "warm.safetensors")
    store.file.write_text(f"base: {model}\nparts: []\n")
    commits = [commit(store, f"Step {i}", warm=8.0 + i if i < 3 else -8.0 - i) for i in range(6)]
    words = ["the", "and", "a"]
    pairs = [
        {"kind": "pair", "prompt": f"{v} {w}", "positive": "warm", "negative": "cold"} for w in words for v in words
    ]  # fmt: skip
    (store.work / "warm.yaml").write_text(json.dumps({"name": "warm", "items": pairs}))
    search = ["bisect", "--eval", "warm.yaml", "--good", "HEAD~5", "--json"]
    code, text, err = steer(*search)
    assert code == 0, err
    found = json.loads(text)
    assert (found["broken"], found["last_good"]) == (commits[3], commits[2])
    assert len(found["figures"]) < len(commits)
    recipes = [read_commit(store, digest).composition for digest in commits]
    evaluated = [len(referrers.of(store, each, referrers.EVALUATION)) for each in recipes]
    assert sum(evaluated) == len(found["figures"])
    assert json.loads(steer(*search)[1]) == found  # from what is stored: nothing is evaluated again
    assert [len(referrers.of(store, each, referrers.EVALUATION)) for each in recipes] == evaluated
