"""`steer vectors`: vectors shown, compared, converted and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import Outcome, error_of

from steer.evaluation.exports import references
from vectors.steering import SteeringVector
from vectors.storage.files import digest_file


def test_what_is_replaced_is_said_and_an_input_is_not(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    old = SteeringVector.load(extracted).digest
    arguments = ["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "1-2"]
    _, out, err = steer("extract", *arguments, "--force")
    assert f"replaces warm.safetensors, which was {old}\n" in err
    assert "replaces" not in out
    assert "replaces" not in steer("vectors", "convert", "warm.safetensors", "other.pt")[2]
    again = steer("vectors", "convert", "warm.safetensors", "other.pt", "--force")
    assert "replaces other.pt, which was sha256:" in again[2]
    assert "replaces" not in steer("vectors", "plot", "warm.safetensors")[2]
    assert "replaces warm.png, which was sha256:" in steer("vectors", "plot", "warm.safetensors", "--force")[2]
    same = steer("vectors", "convert", "warm.safetensors", "./warm.safetensors", "--layers", "1")
    assert "is the file given as FILE" in error_of(same)


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_a_damaged_vector_is_refused(damage: str, extracted: Path, steer: Callable[..., Outcome]) -> None:
    content = bytearray(extracted.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    else:
        content[-2] ^= 1
    extracted.write_bytes(bytes(content))
    message = {"truncated": "is truncated", "tampered": "was changed after it was written"}[damage]
    assert message in error_of(steer("vectors", "show", extracted))
    assert message in error_of(steer("try", extracted, "-p", "a"))


def test_vectors_are_shown_compared_converted_and_drawn(extracted: Path, steer: Callable[..., Outcome]) -> None:
    code, out, _ = steer("vectors", "show", extracted)
    assert code == 0
    assert "diffmean" in out
    assert "acts at" in out
    facts = json.loads(steer("vectors", "show", extracted, "--json")[1])
    assert facts["digest"] == SteeringVector.load(extracted).digest
    assert steer("vectors", "convert", extracted, "warm.gguf", "--layers", "1-2")[0] == 0
    converted = SteeringVector.load("warm.gguf")
    assert converted.metadata["measured"] == SteeringVector.load(extracted).metadata["measured"]
    of_file = digest_file(Path("warm.gguf"))  # not of the artifact that it could become
    assert json.loads(steer("vectors", "show", "warm.gguf", "--json")[1])["digest"] == of_file
    assert of_file in steer("vectors", "show", "warm.gguf")[1]
    code, out, _ = steer("vectors", "compare", extracted, "warm.gguf", "--json")
    assert json.loads(out)["b"] == of_file
    assert [round(entry["cosine"], 6) for entry in json.loads(out)["layers"]] == [1.0, 1.0]
    assert steer("vectors", "convert", extracted, "acting.safetensors", "--layers", "acting")[0] == 0
    acting = SteeringVector.load("acting.safetensors")
    assert tuple(acting.layers) == acting.apply == SteeringVector.load(extracted).apply
    assert steer("vectors", "convert", extracted, "warm.pt")[0] == 0  # other tools apply every layer they are given
    assert list(torch.load("warm.pt", weights_only=True)) == list(SteeringVector.load(extracted).apply)
    assert steer("vectors", "compare", extracted, extracted)[1].count("1.000") == 4
    assert steer("vectors", "plot", extracted)[0] == 0
    assert extracted.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "no known suffix" in error_of(steer("vectors", "plot", extracted, "-o", "warm.txt"), 2)
    for name in ("one.svg", "two.svg"):
        assert steer("vectors", "plot", extracted, "-o", name)[0] == 0
    assert Path("one.svg").read_bytes() == Path("two.svg").read_bytes()
    outcome = steer("vectors", "convert", extracted, "few.safetensors", "--layers", "2-5")
    assert error_of(outcome) == "the vector holds no layer 4, 5"
    assert "does not say which format" in error_of(steer("vectors", "convert", extracted, "warm.xyz"), 2)


def test_the_recommendation_of_a_vector_is_shown(extracted: Path, steer: Callable[..., Outcome]) -> None:
    recommended = SteeringVector.load(extracted).metadata["recommended"]
    shown = steer("vectors", "show", extracted)[1]
    assert f"strength {recommended['strength']:g} at layer {recommended['layers'][0]}: {recommended['reason']}" in shown


def test_the_evaluations_of_a_vector_are_shown_and_those_of_what_its_file_held_before_are_counted(
    extracted: Path, steer: Callable[..., Outcome]
) -> None:
    facts = json.loads(steer("vectors", "show", extracted, "--json")[1])
    assert (facts["evaluations"], facts["evaluations_of_other_content"]) == ([], 0)
    entry = {
        "vector": facts["digest"], "report": "sha256:1", "folder": "one", "expression": "0.5*warm", "outcome": "works",
    }  # fmt: skip
    newer = {**entry, "report": "sha256:2", "folder": "two", "sentence": "warm works: it moves the margin by +0.1"}
    former = {**entry, "vector": "sha256:0", "report": "sha256:3"}
    for each in (entry, newer, former):
        references.add(extracted, each)
    shown = steer("vectors", "show", extracted)[1]
    assert "evaluation   0.5*warm: works\n             one/report.json  sha256:1\n" in shown
    assert "evaluation   warm works: it moves the margin by +0.1\n             two/report.json  sha256:2\n" in shown
    assert "evaluations  1 more of other content that the file had" in shown
    facts = json.loads(steer("vectors", "show", extracted, "--json")[1])
    assert (facts["evaluations"], facts["evaluations_of_other_content"]) == ([entry, newer], 1)
    references.path_of(extracted).write_text("{}")
    code, shown, err = steer("vectors", "show", extracted)
    assert code == 0
    assert "diffmean" in shown
    assert "warm.evaluations.json is no list of evaluations" in err


def test_many_vectors_are_compared_in_pairs(data: Path, steer: Callable[..., Outcome]) -> None:
    one, other = torch.eye(8)[0], torch.eye(8)[1]
    for name, layers in (("a", {0: one, 1: 2 * one}), ("b", {1: other}), ("c", {0: one + other, 1: -one})):
        SteeringVector(layers).save(data / f"{name}.safetensors")
    files = [f"{name}.safetensors" for name in "abc"]
    report = json.loads(steer("vectors", "compare", *files, "--json")[1])
    assert report["files"] == files
    found = [[(e["layer"], round(e["cosine"], 3)) for e in pair["layers"]] for pair in report["pairs"]]
    assert found == [[(1, 0.0)], [(0, 0.707), (1, -1.0)], [(1, 0.0)]]
    lines = steer("vectors", "compare", *files)[1].splitlines()
    assert lines[4].split() == ["layer", "A·B", "A·C", "B·C", "norm", "A", "norm", "B", "norm", "C"]
    assert lines[5].split() == ["0", "-", "0.707", "-", "1.000", "-", "1.414"]
    assert "name two or more vector files" in steer("vectors", "compare", "a.safetensors")[2]


def test_task_vectors_have_norms_and_cosines(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name, layer, change in (("up", 1, 0.5), ("down", 1, -0.25), ("else", 2, 0.5)):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        with torch.no_grad():
            model.model.layers[layer].mlp.up_proj.weight.add_(change)
        model.save_pretrained(data / name)
        assert steer("diff", model_folder, data / name, "-o", f"{name}.safetensors")[0] == 0
    size = model.model.layers[1].mlp.up_proj.weight.numel()
    report = json.loads(steer("vectors", "show", "up.safetensors", "--json")[1])
    assert report["layers"] == [{"layer": "1", "norm": pytest.approx(0.5 * size**0.5, rel=1e-5)}]
    assert report["norm"] == pytest.approx(0.5 * size**0.5, rel=1e-5)
    files = [f"{name}.safetensors" for name in ("up", "down", "else")]
    report = json.loads(steer("vectors", "compare", *files, "--json")[1])
    assert [[round(value, 4) for value in row] for row in report["cosines"]] == [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
    assert steer("vectors", "compare", *files)[1].splitlines()[1].split()[2:] == ["1.000", "-1.000", "0.000"]
    SteeringVector({0: torch.ones(4)}).save(data / "v.safetensors")
    mixed = steer("vectors", "compare", "up.safetensors", "v.safetensors")
    assert "task vectors can't be compared with steering vectors" in error_of(mixed, 2)
