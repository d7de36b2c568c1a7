"""What somebody new types: names of other tools, hyphens, folders in the place of vectors, outputs that exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import Outcome, error_of


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["extrat"], "did you mean steer extract?"),
        (["distill"], "did you mean steer bake?"),
        (["extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--method", "caa"], "did you mean diffmean?"),
        (["bake", "warm", "--mode", "distill", "-o", "out"], "Did you mean distil?"),
        (["bake", "warm", "--mode", "sft", "-o", "out"], "Did you mean train?"),
    ],
)
def test_names_that_others_use_get_a_suggestion(
    arguments: list[str], meant: str, data: Path, steer: Callable[..., Outcome]
) -> None:
    code, _, err = steer(*arguments)
    assert code == 2
    assert meant in err


def test_an_output_that_exists_is_replaced_only_by_force(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    before = extracted.read_bytes()
    again = ["extract", "--pos", "cold.jsonl", "--neg", "warm.jsonl", "--model", model_folder, "-o", extracted]
    copy, plot = ["vectors", "convert", extracted, "copy.gguf"], ["vectors", "plot", extracted]
    assert steer(*copy)[0] == steer(*plot)[0] == 0
    for command in (again, copy, plot, ["diff", model_folder, model_folder, "-o", extracted]):
        assert "exists" in error_of(steer(*command))
        assert "--force" in steer(*command)[2]
    assert extracted.read_bytes() == before
    for command in (again, copy):
        code, _, err = steer(*command, "--force")
        assert code == 0, err
    assert extracted.read_bytes() != before


def test_the_next_command_that_is_printed_runs(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    files = ("--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "-o", "my trait-2.safetensors")
    code, _, err = steer("extract", *files)
    assert code == 0, err
    assert f"next: steer try 'my trait-2.safetensors' --model {model_folder} -p" in err
    assert "the name stands in quotes: steer try \"1.5*'my trait-2'\"" in err
    arguments = ("-p", "hello", "--model", model_folder, "--max-tokens", 2)
    assert steer("try", "my trait-2.safetensors", *arguments)[0] == 0
    assert steer("try", "1.5*'my trait-2'", *arguments)[0] == 0


def test_a_name_with_a_hyphen_is_told_how_to_be_written(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    extracted.rename("my-trait.safetensors")
    code, _, err = steer("try", "2*my-trait", "-p", "hello", "--model", model_folder)
    assert code == 1
    assert "write the name my-trait in quotes: 'my-trait'" in err


@pytest.mark.parametrize("name", ["my-model", "./my-model", "model.v2"])
def test_a_folder_in_the_place_of_a_vector_is_named_as_one(
    name: str, data: Path, steer: Callable[..., Outcome]
) -> None:
    Path(name).mkdir()
    code, _, err = steer("bake", name, "-o", "out", "--mode", "fold")
    assert code == 1
    assert f"{name} is a folder, not a vector or an expression" in err
    assert "--model FOLDER" in err


@pytest.mark.parametrize("kind", ["model", "lora"])
def test_a_bake_makes_no_folder_with_the_name_of_a_file(
    kind: str, extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    common = ("--model", model_folder, "-o", "out.safetensors", "--as", kind)
    for arguments in (("--data", "warm.jsonl"), ("warm", "--mode", "distil"), ("warm", "--mode", "fold")):
        code, _, err = steer("bake", *arguments, *common)
        assert code == 2
        assert f"--as {kind} writes a folder, and out.safetensors is the name of a file" in err
        assert "--as vector" in err
