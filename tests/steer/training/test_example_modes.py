"""Training on examples: imitating, preferring, and the difference of two trainings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from bakes import NO_REPLAY, WORDS, contrasting, imitating, preferring

from steer.reports.training import rows
from steer.training import difference, work
from steer.training.api import bake
from steer.training.requests import Replay, TrainingSettings
from vectors.errors import ExampleError, ModelError, UsageError
from vectors.storage.runs import read_json, report_of
from vectors.task import TaskVector


def test_texts_are_imitated_and_pairs_preferred(
    folder: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    made = imitating(
        texts[0],
        folder,
        tmp_path / "sft",
        settings={"steps": 60},
        replay=NO_REPLAY,
        pos=held_out[0],
        neg=held_out[1],
    )
    report = bake(made)
    models = report["models"]
    assert models["baked"]["margin"] > models["base"]["margin"] + 0.5
    pairs = tmp_path / "pairs.jsonl"
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in texts]
    rows = [
        {"prompt": a["prompt"], "positive": a["completion"], "negative": b["completion"]}
        for a, b in zip(*lines, strict=True)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    report = bake(
        preferring(pairs, folder, tmp_path / "dpo", replay=Replay(None, 0.2), pos=held_out[0], neg=held_out[1])
    )
    assert report["models"]["baked"]["margin"] > models["base"]["margin"] + 0.2
    assert report["samples"]["general"] > 0


def test_the_difference_of_both_signs_is_a_task_vector(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    report = bake(contrasting(*texts, folder, tmp_path / "warmth.safetensors", as_="vector", replay=NO_REPLAY))
    both = TaskVector.open(tmp_path / "warmth.safetensors")
    assert report["weights"] == {"for": 1.0, "against": -1.0}
    assert set(report["models"]) == {"base", "baked"}
    assert report["dose"] == {}
    record = json.loads((tmp_path / "warmth.run.json").read_text())
    assert record["details"]["reports"]["for"]["models"]["baked"]["loss"] > 0
    halves = {}
    for name, file in zip(("for", "against"), texts, strict=True):
        own = imitating(file, folder, tmp_path / f"{name}.safetensors", as_="vector", replay=NO_REPLAY)
        bake(own)
        halves[name] = TaskVector.open(tmp_path / f"{name}.safetensors")
    name = next(iter(both.parameters))
    expected = halves["for"].delta(name) - halves["against"].delta(name)
    assert abs(both.delta(name) - expected).max() < 1e-6
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_halves_that_an_earlier_version_trained_are_not_trained_again(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = contrasting(*texts, folder, tmp_path / "warmth.safetensors", as_="vector", replay=NO_REPLAY)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(difference, "new_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bake(made)
    trained = {}
    for name in ("for", "against"):
        path, value = read_json(work.path_of(made.out) / f"{name}.safetensors")
        trained[name] = report_of(value)
        path.with_name(f"{name}.report.json").write_text(json.dumps(trained[name]))
        path.unlink()
    monkeypatch.setattr(difference, "bake", interrupt)
    assert bake(made)["reports"] == trained


def test_a_short_file_of_replay_data_is_repeated(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": f"{word} {word} rain"}) for word in WORDS[:4]))
    made = imitating(texts[0], folder, tmp_path / "out", replay=Replay(few, 0.5), settings={"steps": 4})
    samples = bake(made)["samples"]
    assert samples["general"] == samples["behaviour"]


def test_retention_is_measured_with_and_without_replay_data(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    made = imitating(
        texts[0], folder, tmp_path / "out", replay=Replay(None, 0.4), compare_replay=True, settings={"steps": 40}
    )
    report = bake(made)
    assert report["retention"] > report["retention_without_mix"]


def test_a_tokenizer_from_outside_of_the_folder_is_refused_before_training(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (copy / "tokenizer.json").symlink_to("../tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json can't be copied: it is a link that leaves the folder"):
        bake(imitating(texts[0], copy, tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["model", "tokenizer.json"]


def test_examples_that_are_trained_on_are_not_held_out(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    some = tmp_path / "some.jsonl"  # half of the training data, written as conversations
    lines = [json.loads(line) for line in texts[0].read_text().splitlines()][:5]
    turns = [
        [{"role": "user", "content": a["prompt"]}, {"role": "assistant", "content": a["completion"]}] for a in lines
    ]
    some.write_text("\n".join(json.dumps({"messages": each}) for each in [*turns, turns[0][:1]]))
    negative = tmp_path / "negative.jsonl"
    negative.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ExampleError) as caught:
        bake(imitating(texts[0], folder, tmp_path / "out", pos=some, neg=negative, replay=Replay(some)))
    assert [problem.partition(" (the first")[0] for problem in caught.value.problems] == [
        f"5 of the 6 examples of --replay {some} are also in {texts[0]}",
        f"5 of the 6 examples of --pos {some} are also in {texts[0]}",
        f"6 of the 6 examples of --pos {some} are also in --replay {some}",
    ]


def test_a_contrast_of_a_file_with_itself_is_refused(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--against holds every example of --data"):
        bake(contrasting(texts[0], texts[0], folder, tmp_path / "out.safetensors", as_="vector"))


def test_steps_default_to_what_the_samples_carry() -> None:
    settings = TrainingSettings()
    assert settings.for_samples(24).total_steps == 24
    assert settings.for_samples(4).total_steps == 8
    assert settings.for_samples(10_000).total_steps == 200
    assert TrainingSettings(accumulate=2).for_samples(100).total_steps == 50
    assert TrainingSettings(steps=3).for_samples(100).total_steps == 3


def test_figures_come_with_the_number_of_items_and_the_step_of_the_weights(
    folder: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    fields = {"pos": held_out[0], "neg": held_out[1], "replay": NO_REPLAY, "as_": "vector"}
    settings = {"steps": None, "evaluate_every": 8}
    report = bake(contrasting(*texts, folder, tmp_path / "out.safetensors", settings=settings, **fields))
    assert (report["measured_on"]["positive"], report["measured_on"]["negative"]) == (25, 25)
    header, _ = rows(report["models"], report["measured_on"])
    assert header[1] == "trait margin (n=25+25)"
    for half in report["reports"].values():
        assert half["settings"]["steps"] == half["steps"] == 23
        assert half["measured_on"]["held_out"] == 2
        losses = {e["step"]: e["eval_behaviour_loss"] for e in half["history"] if "eval_behaviour_loss" in e}
        assert half["best"]["held_out_loss"] == min(losses.values()) == losses[half["best"]["step"]]
