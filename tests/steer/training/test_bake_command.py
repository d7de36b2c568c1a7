"""`steer bake` as it is typed: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch

from steer.training import work
from vectors.steering import SteeringVector

Outcome = tuple[int, str, str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model, a vector, prompts, texts of two kinds and pairs."""
    monkeypatch.chdir(tmp_path)
    pico.save(tmp_path / "model", "llama")
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(4))
    SteeringVector({1: 4 * direction / direction.norm()}).save("warm.safetensors")
    words = ("sun", "rain", "warm", "cold")
    asked = [f"{a} {b}?" for a in words for b in words]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for name in ("warm", "cold"):
        lines = [{"prompt": prompt, "completion": f" the {name} and the {name}"} for prompt in asked]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


MODEL = ("--model", "model", "--any-base")
SHORT = ("--steps", 12, "--lr", "1e-2", "--replay", "0.2")


def test_a_fold_prints_its_way_and_its_proof(here: Path, steer: Callable[..., Outcome]) -> None:
    code, out, err = steer("bake", "2*warm", *MODEL, "-o", "out", "--skip-vllm")
    assert code == 0, err
    assert "mode fold: weights can express it exactly" in err
    assert "via bias, the bias of each block's last projection (the model has the slot)" in out
    assert "vLLM: left out by --skip-vllm\nverdict: equal, on 12 held-out prompts\nwrote out" in out
    code, out, err = steer("bake", "2*warm", *MODEL, "-o", "again", "--skip-vllm", "--json")
    found = json.loads(out)
    assert found["proof"]["verdict"] == "equal"
    assert "folded against the composition" in (here / "again" / "report.html").read_text()
    assert {"output", "mode", "composition", "vectors", "base", "via", "outputs", "proof", "seconds"} <= found.keys()


def test_what_can_not_be_folded_is_distilled_and_the_reason_is_said(here: Path, steer: Callable[..., Outcome]) -> None:
    given = ("--prompts", "prompts.jsonl", "--pos", "warm.jsonl", "--neg", "cold.jsonl")
    code, out, err = steer("bake", "2*warm@response", *MODEL, "-o", "out", *SHORT, "--tokens", 6, *given)
    assert code == 0, err
    assert "mode distil: it can't be folded: 2*warm@response acts on some tokens only" in err
    rows = [line.split()[0] for line in out.splitlines()[1:4]]
    assert rows == ["base", "steered", "baked"]
    assert "dose " in out
    assert "retention " in out
    said = dict(re.findall(r"step (\d+)/12 .*trait (-?[\d.]+)", err))
    dose = float(re.search(r"dose +kl (-?[\d.]+)", out)[1])  # type: ignore[index]
    assert abs(float(said["12"]) - dose) < 0.05
    assert {p.name for p in (here / "out").iterdir()} >= {"config.json", "report.html", "curves.svg", "README.md"}


def test_training_takes_files_and_prints_json(here: Path, steer: Callable[..., Outcome]) -> None:
    code, out, err = steer(
        "bake",
        "--mode",
        "train",
        "--data",
        "warm.jsonl",
        *MODEL,
        "-o",
        "v.safetensors",
        "--as",
        "vector",
        *SHORT,
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert {"models", "dose", "retention", "samples", "settings", "history", "outputs", "seconds"} <= found.keys()
    assert (here / "v.report.html").is_file()
    assert "parameters" in steer("vectors", "show", "v.safetensors")[1]
    assert steer("try", "v.safetensors", "-p", "the", *MODEL)[0] == 1, "a task vector is no steering vector"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "there is nothing to bake: no composition, no --teacher-prompt"),
        (("--mode", "fold"), "there is nothing to bake: no composition"),
        (("warm", "--teacher-prompt", "be warm"), "not both"),
        (("warm", "--data", "warm.jsonl", "--mode", "distil"), "--data belongs to --mode train"),
        (("--mode", "train"), "needs either --data or --pairs"),
        (("warm", "--mode", "train", "--data", "warm.jsonl"), "has no teacher"),
        (("warm", "--pos", "warm.jsonl"), "are used together"),
        (("warm", "--mode", "distil", "--lr", "fast"), "--lr is 'fast'"),
        (("warm", "--mode", "distil", "--tokens", "0", "--temperature", "-1"), "--tokens is 0, not at least 1"),
        (
            ("warm", "--mode", "fold", "--steps", "3"),
            "--steps belongs to --mode distil and --mode train",
        ),
        (("warm", "--mode", "distil", "--via", "bias"), "--via belongs to --mode fold, not to --mode distil"),
        (("warm", "--via", "bais"), "there is no --via 'bais'"),
        (("0*warm",), "the composition changes nothing"),
        (("warm", "--mode", "distil", "--replay", "2"), "has no share in [0, 1)"),
        (("warm", "--mode", "distil", "--optimiser", "adam"), "there is no optimiser 'adam'"),
        (("warm", "--mode", "distil", "--set", "beta3=1"), "has no option 'beta3'"),
        (("warm", "--as", "vector", "--mode", "fold"), "a fold adds tensors that no vector holds"),
        (("nobody",), "the name 'nobody' is not bound"),
        (("warm", "--mode", "distil", "--prompts", "nowhere.jsonl"), "there is no file nowhere.jsonl"),
    ],
)
def test_wrong_words_are_one_clear_error(
    arguments: tuple[str, ...], reason: str, here: Path, steer: Callable[..., Outcome]
) -> None:
    code, out, err = steer("bake", *arguments, *MODEL, "-o", "out")
    assert code in (1, 2), err
    assert out == ""
    assert reason in err, err
    assert "\nhint: " in err
    assert not (here / "out").exists()
    assert not work.path_of(Path("out")).exists()


@pytest.mark.parametrize("form", [("--mix", "0.2"), ("--mix=0.2",)])
def test_the_option_names_of_the_release_before_still_work_with_a_warning(
    form: tuple[str, ...], here: Path, steer: Callable[..., Outcome]
) -> None:
    """Through the command itself: in each mode that trains, the old names do what the new ones do."""
    short = (*MODEL, "--steps", 2, "--tokens", 4, "--json")
    teacher = ("bake", "warm", "--mode", "distil", "--prompts", "prompts.jsonl", "--as", "vector", *short)
    code, out, err = steer(*teacher, *form, "-o", "old.safetensors")
    assert code == 0, err
    assert "warning: --mix is deprecated and will be removed in the next release; use --replay" in err
    assert json.loads(out)["settings"]["mix"] == {"share": 0.2, "file": None}
    code, _, err = steer(*teacher, "--replay", "0.2", "-o", "new.safetensors")
    assert code == 0, err
    assert "deprecated" not in err
    assert Path("old.safetensors").read_bytes() == Path("new.safetensors").read_bytes()


def test_the_old_name_of_an_option_is_named_by_its_new_one_where_it_does_not_belong(
    here: Path, steer: Callable[..., Outcome]
) -> None:
    code, _, err = steer("bake", "warm", "--mode", "fold", "--compare-mix", *MODEL, "-o", "out")
    assert code == 2
    assert "--compare-mix is deprecated and will be removed in the next release; use --compare-replay" in err
    assert "--compare-replay belongs to --mode distil and --mode train, not to --mode fold" in err


def test_options_of_optimisers_are_listed_from_the_registry(steer: Callable[..., Outcome]) -> None:
    code, out, err = steer("bake", "--list-options")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["adamw", "eps", "1e-08"] in [row[:3] for row in rows]
    assert {row[0] for row in rows[1:]} == {"adamw", "apollo", "apollo_mini", "muon"}
