"""The command line as a whole: failures, interrupts, help, and `steer models`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import WARM, Outcome, error_of

from steer.doctor import installation
from vectors.steering import SteeringVector


def test_an_interrupt_ends_in_one_line_and_writes_nothing(data: Path, model_folder: Path) -> None:
    lines = [json.dumps({"text": f"{text} {i}"}) for i in range(1000) for text in WARM[:4]]
    (data / "many.jsonl").write_text("\n".join(lines))
    command = ["extract", "--pos", "many.jsonl", "--neg", "cold.jsonl", "--model", str(model_folder)]
    # A shell's background job, as CI may be, begins with SIGINT ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from steer.cli import main; main({command!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "loading the model …\n"
    first = process.stderr.readline()  # the model is loaded, the measuring begins
    assert first.startswith("model "), first
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "error: interrupted" in err
    assert "half-written" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in data.iterdir()) == ["cold.jsonl", "many.jsonl", "warm.jsonl"]


def test_models_are_listed_found_and_shown(
    steer: Callable[..., Outcome], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = json.loads(steer("models", "ls", "--json")[1])["models"]
    assert models[0]["model"] == "smollm2"
    assert models[0]["ready"] is False
    assert "prepared on first use" in steer("models", "ls")[1]
    assert steer("models", "path", model_folder)[1].strip() == str(model_folder)
    facts = json.loads(steer("models", "show", model_folder, "--json")[1])
    assert facts["digest"].startswith("sha256:")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert "there is no model" in error_of(steer("models", "path", "nowhere"))


def test_a_traceback_is_shown_only_with_debug(steer: Callable[..., Outcome]) -> None:
    assert "Traceback" not in steer("vectors", "show", "missing.safetensors")[2]
    for arguments in (["--debug", "extract"], ["extract", "--debug"]):
        assert "Traceback" in steer(*arguments)[2]


def test_a_defect_of_ours_names_itself_as_one(steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("vectors.references.cached", broken)
    outcome = steer("models", "ls")
    assert "ZeroDivisionError: division by zero" in error_of(outcome)
    assert "a defect of steer" in outcome[2]


@pytest.mark.parametrize("group", [[], ["vectors"], ["models"]], ids=str)
def test_a_group_alone_prints_its_help(group: list[str], steer: Callable[..., Outcome]) -> None:
    code, out, err = steer(*group)
    assert (code, err) == (0, "")
    assert out == steer(*group, "--help")[1]
    assert out.startswith(" ".join(["Usage: steer", *group]))


def test_a_traceback_may_be_asked_for_in_the_environment(
    steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_DEBUG", "1")
    assert "Traceback" in steer("extract")[2]
    assert "STEER_DEBUG" in steer("--help")[1]


def test_a_wrong_command_is_wrong_usage(steer: Callable[..., Outcome]) -> None:
    assert "No such command" in error_of(steer("extrakt"), 2)
    assert steer("--version")[1].startswith("steer 0.")


def test_an_expression_that_begins_with_a_minus_is_shown_where_it_belongs(steer: Callable[..., Outcome]) -> None:
    assert 'steer eval … -- "-1*NAME"' in steer("eval", "-1*warm")[2]
    assert "-- " not in steer("eval", "--wrong")[2]


def test_a_failure_with_json_is_one_object_with_the_same_exit_code(steer: Callable[..., Outcome]) -> None:
    for arguments, code, words in (
        (["vectors", "show", "missing.safetensors", "--json"], 1, "missing.safetensors"),
        (["try", "--json", "a + b", "-p", "x", "--strengths", "y"], 2, "'y' is not a finite number"),
        (["extract", "--json", "--wrong"], 2, "No such option"),
        (["--json", "extrakt"], 2, "No such command"),
    ):
        outcome = steer(*arguments)
        failure = json.loads(outcome[1])
        assert outcome[0] == code
        assert set(failure) == {"error", "problems", "hint"}
        assert any(words in problem for problem in failure["problems"])
        assert failure["hint"]
        assert outcome[2] == ""


def test_json_of_one_run_is_forgotten_by_the_next(steer: Callable[..., Outcome]) -> None:
    assert steer("vectors", "show", "missing.safetensors", "--json")[1].startswith("{")
    assert "error: " in steer("vectors", "show", "missing.safetensors")[2]


def test_quiet_leaves_data_and_errors_alone(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    arguments = ["extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder]
    loud = steer(*arguments)
    for quiet in (["-q", *arguments, "--force"], [*arguments, "--quiet", "--force"]):
        assert steer(*quiet) == (0, loud[1], "")
    assert "error: " in steer("-q", "vectors", "show", "missing.safetensors")[2]


def test_control_sequences_never_reach_the_terminal(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    evil = "e\x1b]0;title\x07vil\u202e.safetensors"
    outcome = steer("vectors", "show", evil)
    assert "\\x1b]0;title\\x07" in error_of(outcome)
    assert "\\u202e" in outcome[2]
    assert not set("\x1b\x07\u202e") & set(outcome[2])
    SteeringVector({0: torch.ones(4)}, {"licence": "\x9b31mred"}).save("named.safetensors")
    assert "\\x9b31mred" in steer("vectors", "show", "named.safetensors")[1]
    shown = steer("vectors", "show", "named.safetensors", "--json")[1]
    assert "\x9b" not in shown
    assert json.loads(shown)["licence"] == "\x9b31mred"


def test_errors_are_bounded(steer: Callable[..., Outcome]) -> None:
    long = error_of(steer("vectors", "show", "x" * 100_000))
    assert len(long) < 3000
    assert "more characters" in long
    many = error_of(steer("try", "warm", "-p", "a", "--strengths", ",".join(["x"] * 5000)), 2)
    assert "more problems" in many
    assert len(many) < 10_000


def test_sigterm_ends_like_an_interrupt_with_its_own_code(data: Path, model_folder: Path) -> None:
    lines = [json.dumps({"text": f"{text} {i}"}) for i in range(1000) for text in WARM[:4]]
    (data / "many.jsonl").write_text("\n".join(lines))
    command = ["extract", "--pos", "many.jsonl", "--neg", "cold.jsonl", "--model", str(model_folder)]
    code = f"from steer.cli import main; main({command!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "loading the model …\n"
    assert process.stderr.readline().startswith("model ")
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert err.startswith("error: ended by SIGTERM\n")
    assert "Traceback" not in err
    assert sorted(path.name for path in data.iterdir()) == ["cold.jsonl", "many.jsonl", "warm.jsonl"]


def test_a_command_that_sigterm_is_to_end_says_of_no_failure() -> None:
    """As `steer serve` does it; run here, the signal would end the tests where nothing handles it."""
    code = """
import os, signal, time
from steer import cli
def serve(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except SystemExit as ended:
        raise SystemExit(ended.code) from None
cli.root.main = serve
cli.main(["serve"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_asks_steer_itself(shell: str, steer: Callable[..., Outcome]) -> None:
    code, out, _ = steer("completion", shell)
    assert code == 0
    assert f"_STEER_COMPLETE={shell}_complete" in out


def completed(words: str, folder: Path, shell: str = "bash") -> list[str]:
    """What a shell is offered for the last word of a command line, without torch being imported."""
    script = (
        "import sys; from steer.cli import run; run([]);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    environment = {
        **os.environ, "_STEER_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_models_vectors_and_methods_are_completed_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "warm.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert completed("steer try w", tmp_path) == ["warm.safetensors"]
    assert completed("steer try x --vector a=w", tmp_path) == ["a=warm.safetensors"]
    assert {"smollm2", "folder"} <= set(completed("steer extract --model ", tmp_path))
    assert completed("steer extract --method whi", tmp_path) == ["whitened"]
    assert "dare_ties" in completed("steer merge --method da", tmp_path)
    assert completed("steer comp", tmp_path) == ["completion"]


def test_the_doctor_says_what_is_installed_and_what_can_run(
    steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "COMPILED", {})  # importing vLLM takes seconds
    report = json.loads(steer("doctor", "--json")[1])
    assert set(report) == {
        "steer", "python", "executable", "platform", "packages", "extras", "devices", "vllm", "folders", "environment",
        "leftovers", "model", "can", "problems",
    }  # fmt: skip
    assert report["packages"]["torch"] == torch.__version__
    assert report["can"]["extract, try"] == "yes"
    assert "can run" in steer("doctor")[1]


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_do_not_spin_while_they_wait_unless_asked_to(given: dict[str, str], expected: str) -> None:
    code = "import sys, steer.cli, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [expected, "False"]
