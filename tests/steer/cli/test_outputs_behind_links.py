"""One rule for all commands that write: a link as an output file is followed, one in the place of a folder exists."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from outcomes import COLD, WARM, Outcome

from vectors.steering import SteeringVector


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a vector and examples."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("base", "tuned")):
        pico.save(folder / name, "llama", seed=seed)
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(4))
    measured = {"1": {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0, "auroc_shuffled": 0.5, "cohens_d": 1.0}}
    SteeringVector({1: direction}, {"measured": measured, "apply": [1]}).save(folder / "warm.safetensors")
    for name, texts in (("pos", WARM), ("neg", COLD)):
        (folder / f"{name}.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    return folder


FILES = {
    "extract": ("extract", "--pos", "{i}/pos.jsonl", "--neg", "{i}/neg.jsonl", "--model", "{i}/base", "-o", "{o}"),
    "convert": ("vectors", "convert", "{i}/warm.safetensors", "{o}"),
    "plot": ("vectors", "plot", "{i}/warm.safetensors", "-o", "{o}"),
    "diff": ("diff", "{i}/base", "{i}/tuned", "-o", "{o}"),
    "merge": ("merge", "{i}/tuned", "--base", "{i}/base", "--method", "task_arithmetic", "--as", "vector", "-o", "{o}"),
}
SUFFIX = {"plot": ".svg"}
FOLDERS = {
    "merge": ("merge", "{i}/tuned", "{i}/base", "--method", "linear", "-o", "{o}"),
    "apply": ("apply", "{i}/base", "{i}/task.safetensors", "-o", "{o}"),
    "diff": ("diff", "{i}/base", "{i}/tuned", "--to-lora", "2", "-o", "{o}"),
    "bake": ("bake", "warm", "--vector", "warm={i}/warm.safetensors", "--model", "{i}/base", "--any-base",
             "--skip-vllm", "-o", "{o}"),
}  # fmt: skip


@pytest.fixture
def run(
    tmp_path: Path, inputs: Path, steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "place").mkdir()
    return lambda line, out: steer(*(part.format(i=inputs, o=out) for part in line))


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_as_an_output_file_is_followed(
    run: Callable[..., Outcome], tmp_path: Path, command: str, there: bool
) -> None:
    suffix = SUFFIX.get(command, ".safetensors")
    link, target = tmp_path / f"link{suffix}", tmp_path / "place" / f"target{suffix}"
    link.symlink_to(f"place/target{suffix}")
    if there:
        target.write_bytes(b"old")
    code, _, err = run((*FILES[command], "--force"), link)
    assert code == 0, err
    assert os.readlink(link) == f"place/target{suffix}"
    assert target.stat().st_size > 3
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("command", FILES)
def test_a_link_to_a_folder_a_loop_and_a_device_are_refused_as_output_files(
    run: Callable[..., Outcome], tmp_path: Path, command: str
) -> None:
    suffix = SUFFIX.get(command, ".safetensors")
    for name, target in (("folder", "place"), ("loop", f"loop{suffix}"), ("device", "/dev/null")):
        (tmp_path / f"{name}{suffix}").symlink_to(target)
        code, _, err = run(FILES[command], tmp_path / f"{name}{suffix}")
        assert code, name
        assert "Traceback" not in err
        assert "defect" not in err
        assert os.readlink(tmp_path / f"{name}{suffix}") == target
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.parametrize("target", ["place", "nothing", "out"], ids=["to a folder", "to nothing", "to itself"])
def test_a_link_in_the_place_of_an_output_folder_exists_already(
    run: Callable[..., Outcome], tmp_path: Path, command: str, target: str
) -> None:
    (tmp_path / "out").symlink_to(target)
    if command == "apply":
        run(FILES["diff"], tmp_path / "task.safetensors")
    line = [part.replace("{i}/task", f"{tmp_path}/task") for part in FOLDERS[command]]
    code, _, err = run(line, tmp_path / "out")
    assert code
    assert "out exists" in err
    assert os.readlink(tmp_path / "out") == target
    assert list((tmp_path / "place").iterdir()) == []
