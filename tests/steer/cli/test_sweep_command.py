"""`steer sweep` and `steer extract --sweep` on a pico model: what they print and write, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import Outcome, error_of

from vectors.steering import SteeringVector


@pytest.fixture
def files(data: Path) -> list[str]:
    """Two files of examples, each with a prompt of its own."""
    for name, text in (("kind", "the warm sun and yes"), ("rude", "cold no rain")):
        rows = [{"prompt": f"day {i}?", "completion": f"{text} {i}"} for i in range(40)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--pos", "kind.jsonl", "--neg", "rude.jsonl"]


def test_a_sweep_writes_its_choice_into_the_vector_and_goes_on_where_it_was(
    files: list[str], extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    arguments = ["sweep", extracted, *files, "--model", model_folder, "--layers", "1,2", "--budget-kl", "0.4"]
    code, out, err = steer(*arguments, "--out", "swept.safetensors", "--json")
    assert code == 0, err
    report = json.loads(out)
    vector = SteeringVector.load("swept.safetensors")
    assert vector.digest == report["vector_digest"]
    assert vector.metadata["recommended"] == report["recommended"]
    assert report["recommended"]["run"] == report["digest"]
    record = json.loads(Path("swept.sweep/run.json").read_text())  # from which docs/sweep.md says how to check it
    parts = [record["config"], record["inputs"], record["metrics"]]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert report["digest"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert f"by the run   {report['digest']}  (" in steer("vectors", "show", "swept.safetensors")[1]
    assert report["test"]["p95"] <= 0.4
    assert Path("swept.sweep/report.html").is_file()
    before = SteeringVector.load(extracted)
    assert "run" not in before.metadata["recommended"]
    code, out, err = steer(*arguments, "--out", "swept.safetensors")
    assert code == 0, err
    assert "recommended: strength" in out
    assert "0 cells measured" in err
    assert SteeringVector.load("swept.safetensors").digest == vector.digest
    outcome = steer("eval", "swept.safetensors", *files, "--model", model_folder, "--seed", 1)
    assert "test items are among the development items of the sweep that chose" in error_of(outcome)


def test_a_sweep_over_exchanged_files_leaves_the_vector_as_it_was(
    files: list[str], extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    files[1::2] = files[3::-2]
    before = extracted.read_bytes()
    arguments = ["sweep", extracted, *files, "--model", model_folder, "--layers", "1,2", "--budget-kl", "0.4"]
    code, out, err = steer(*arguments, "--examples", "10,25")
    assert code == 0, err
    assert "there is no learning curve (--examples 10, 25): it is measured at the point that is recommended" in out
    assert "nothing is recommended: every point within the budget of 0.4 nats lowers the margin" in out
    assert f"nothing was written to {extracted}" in out
    assert extracted.read_bytes() == before


def test_extraction_and_sweep_in_one_go(files: list[str], steer: Callable[..., Outcome], model_folder: Path) -> None:
    code, out, err = steer(
        "extract", *files, "--model", model_folder, "--sweep", "--layers", "1,2", "--budget-kl", "0.4", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    vector = SteeringVector.load("kind.safetensors")
    assert list(vector.apply) == report["recommended"]["layers"]
    assert set(vector.metadata["measured"]) == {"0", "1", "2", "3"}
    assert vector.metadata["data"]["examples"]["positive"] < 40  # the others chose and tested


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--layers", "x"], "'x' in 'x' is not a layer"),
        (["--layers", "9"], "there is no direction at layer 9"),
        (["--strengths", "a"], "--strengths: 'a' is not a number"),
        (["--strengths", "inf"], "--strengths: 'inf' is not a number"),
        (["--budget-kl", "nan"], "--budget-kl is nan"),
        (["--budget-kl", "inf"], "--budget-kl is inf, not a finite number"),
        (["--strengths", "-1", "--layers", "1"], "the strength -1 is not positive"),
        (["--methods", "diffmean,nothing"], "'nothing'"),
        (["--examples", "2.5"], "--examples: 2.5 is not a whole number"),
        (["--methods", "diffmean", "--allow-overlap"], "has no use for --allow-overlap"),
    ],
)
def test_what_a_sweep_refuses(
    more: list[str], words: str, files: list[str], extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    outcome = steer("sweep", extracted, *files, "--model", model_folder, *more)
    assert outcome[0] != 0
    assert words in outcome[2]


def test_a_learning_curve_leaves_the_directions_of_the_vector_and_its_choice(
    files: list[str], extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    Path("neutral.txt").write_text("How are you?\nWhy?\n")
    arguments = ["sweep", extracted, *files, "--model", model_folder, "--layers", "1", "--budget-kl", "0.4"]
    arguments += ["--neutral", "neutral.txt", "--json"]
    reports = []
    for more in ([], ["--examples", "8,100"]):
        code, out, err = steer(*arguments, *more, "--out", f"{len(reports)}.safetensors")
        assert code == 0, err
        reports.append(json.loads(out))
    plain, curve = reports
    assert curve["points"] == plain["points"]
    assert curve["test"] == plain["test"]
    assert [each["repeats"] for each in curve["learning"]] == [5, 1]
    before, after = SteeringVector.load(extracted), SteeringVector.load("1.safetensors")
    assert all(after.layers[i].equal(before.layers[i]) for i in before.layers)
    assert after.metadata["data"] == before.metadata["data"]


def test_items_that_the_vector_was_extracted_from_are_refused(
    files: list[str], extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    files[1::2] = ["warm.jsonl", "cold.jsonl"]
    outcome = steer("sweep", extracted, *files, "--model", model_folder)
    assert "the vector was extracted from" in error_of(outcome)


def test_all_options_of_a_sweep_that_are_wrong_are_named_at_once(
    files: list[str], extracted: Path, steer: Callable[..., Outcome]
) -> None:
    wrong = ["--layers", "x", "--strengths", "abc", "--budget-kl", "-1", "--methods", "foo", "--examples", "y"]
    absent = ["--pos", "p.jsonl", "--neg", "n.jsonl", "--neutral", "texts.jsonl", "--out", "folder/v.safetensors"]
    message = error_of(steer("sweep", "no.safetensors", *absent, *wrong), 2)
    parts = ["'x'", "--strengths: 'abc'", "--budget-kl is -1, not above 0", "'foo'", "--examples: 'y'"]
    parts += [f"there is no file {file}" for file in ("no.safetensors", "p.jsonl", "n.jsonl", "texts.jsonl")]
    parts += ["the folder folder of the output v.safetensors does not exist"]
    assert [part for part in parts if part not in message] == []
    message = error_of(steer("sweep", extracted, *files, "--layers", "99", "--methods", "foo"), 2)
    assert "there is no direction at layer 99" in message
    files[1::2] = ["warm.jsonl", "cold.jsonl"]  # those that the vector was extracted from, which --methods allows
    assert "'foo'" in (message := error_of(steer("sweep", extracted, *files, "--methods", "foo"), 2))
    assert "was extracted from" not in message


def test_a_sweep_replaces_no_other_file_and_no_report_of_another_command_without_force(
    files: list[str], extracted: Path, steer: Callable[..., Outcome], tmp_path: Path
) -> None:
    Path("other.safetensors").write_bytes(extracted.read_bytes())
    Path("evaluated").mkdir()
    Path("evaluated/run.json").write_text('{"command": "eval"}')
    Path("evaluated/report.html").write_text("a report")
    Path("evaluated/cells").mkdir()  # an earlier sweep had begun there
    more = ["--out", "other.safetensors", "--report", "evaluated"]
    message = error_of(steer("sweep", extracted, *files, *more))
    assert "the output other.safetensors exists" in message
    assert "evaluated holds run.json, report.html of `steer eval`" in message
    forced = error_of(steer("sweep", extracted, *files, *more, "--force", "--model", "nowhere"))
    assert "exists" not in forced
    assert "nowhere" in forced
    same = error_of(steer("sweep", extracted, *files, "--out", files[1], "--force"))
    assert f"the output {files[1]} is the file given as --pos" in same
    Path("one.sweep").mkdir()
    Path("one.sweep/report.html").write_text("mine")
    message = error_of(steer("extract", *files, "--out", "one.safetensors", "--sweep", "--model", "nowhere"))
    assert "one.sweep holds report.html of no sweep" in message
