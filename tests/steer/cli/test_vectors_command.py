"""`steer vectors`: vectors shown, compared, converted and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import Outcome, error_of

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
