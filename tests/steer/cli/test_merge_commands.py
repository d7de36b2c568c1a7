"""`steer diff`, `steer merge`, `steer apply`: what they print and refuse, and that transformers loads the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from merges.engine import gpu
from steer.cli import run
from vectors.steering import SteeringVector


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pico Llamas in the current folder: base, a and b, with tokenizers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, name in enumerate(("base", "a", "b")):
        model = pico.build("llama", dtype=torch.float32)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((seed > 0) * 0.02 * torch.randn(parameter.shape, generator=draw))
        model.to(torch.bfloat16).save_pretrained(name, max_shard_size="40KB" if name == "b" else "5GB")
        pico.tokenizer().save_pretrained(name)
    return tmp_path


def test_from_two_models_to_a_merge_that_transformers_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "base", "a", "-o", "a.safetensors"]) == 0
    assert run(["diff", "base", "b", "-o", "b.safetensors", "--json"]) == 0
    capsys.readouterr()
    # Nothing but the vectors is named: the base is known from them.
    assert run(["merge", "a.safetensors", "b.safetensors", "--ties", "-o", "both", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["outputs"]["model.safetensors"].startswith("sha256:")
    model = AutoModelForCausalLM.from_pretrained("both")
    tokenizer = AutoTokenizer.from_pretrained("both")
    assert model.dtype == torch.bfloat16
    assert model(**tokenizer("the warm", return_tensors="pt")).logits.isfinite().all()
    assert tokenizer.chat_template
    card = Path("both/README.md").read_text()
    assert record["plan"] in card
    assert record["outputs"]["model.safetensors"] in card
    assert run(["merge", "--verify", "both"]) == 0
    Path("base").rename("elsewhere")
    Path("a.safetensors").rename("moved.safetensors")
    assert run(["merge", "--verify", "both"]) == 1
    assert "give the paths of its inputs: --vector NAME=PATH" in capsys.readouterr().err
    assert run(["merge", "--verify", "both", "--vector", "a=moved.safetensors", "--base", "elsewhere"]) == 0


def test_a_device_gives_the_same_bytes_and_one_that_is_not_there_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, told in (("mps", "does not run on the device 'mps'"), ("cuda:99", "'cuda:99' is not available")):
        assert run(["merge", "a", "b", "--base", "base", "--ties", "-o", "out", "--device", device]) == 2
        assert told in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(gpu, "find", lambda name: asked.append(name) or torch.device("cpu"))
    for out, device in (("loops", "cpu"), ("torch", "cuda")):
        assert run(["merge", "a", "b", "--base", "base", "--ties", "-o", out, "--device", device]) == 0
    assert Path("loops/model.safetensors").read_bytes() == Path("torch/model.safetensors").read_bytes()
    assert run(["merge", "--verify", "torch", "--device", "cuda"]) == 0
    assert asked == ["cuda", "cuda"]


def test_what_a_task_vector_is_can_be_seen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        assert run(["diff", "base", name, "-o", f"{name}.safetensors"]) == 0
    assert run(["merge", "a.safetensors", "b.safetensors", "--ties", "-o", "both.safetensors"]) == 0
    capsys.readouterr()
    digests = []
    for name in ("a", "b", "both"):
        assert run(["vectors", "show", f"{name}.safetensors", "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out)["digest"])
    assert run(["vectors", "show", "both.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert digests[2] in shown
    assert "method       ties\n" in shown
    assert "parent a " in shown
    assert "parent b " in shown
    # Writing over one says which; a difference of nothing says so; what can't be taken away is named, shortly.
    assert run(["diff", "base", "base", "-o", "a.safetensors", "--force"]) == 0
    said = capsys.readouterr().err
    assert f"replaces a.safetensors, which was {digests[0]}" in said
    assert "base and base have the same weights: the vector is empty" in said
    model = AutoModelForCausalLM.from_pretrained("a")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    biases = {n.replace("weight", "bias"): t[0].clone() for n, t in state.items() if ".mlp." in n}
    model.save_pretrained("folded", state_dict=state | biases)
    assert run(["diff", "base", "folded", "-o", "x.safetensors"]) == 1
    said = capsys.readouterr().err
    assert "base lacks model.layers.0.mlp.down_proj.bias, model.layers.0.mlp.gate_proj.bias" in said
    assert "more\n" in said
    assert "a model with folded-in biases has no task vector" in said


def test_apply_restores_the_fine_tuned_model_and_takes_expressions(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        assert run(["diff", "base", name, "-o", f"{name}.safetensors"]) == 0
    assert run(["apply", "base", "b.safetensors", "-o", "again"]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(n).state_dict() for n in ("again", "b"))
    assert all(torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16)) for n in theirs)
    assert run(["apply", "base", "a - 0.5*bee", "--vector", "bee=b.safetensors", "-o", "mixed"]) == 0
    assert run(["merge", "--expr", "a - 0.5*b", "-o", "mixed2"]) == 0
    assert Path("mixed/model.safetensors").read_bytes() == Path("mixed2/model.safetensors").read_bytes()
    assert run(["merge", "--recipe", "mixed/run.json", "--without", "bee", "-o", "undone"]) == 0
    assert run(["merge", "--expr", "a", "-o", "never"]) == 0
    assert Path("undone/model.safetensors").read_bytes() == Path("never/model.safetensors").read_bytes()
    capsys.readouterr()
    assert run(["apply", "base", "ablate(a) + nowhere", "-o", "x"]) == 1
    assert "'nowhere' is not bound" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    assert run(["merge", "a", "b", "--base", "base", "--ties", "--scope", "global", "--dry-run", "-o", "out"]) == 0
    printed = capsys.readouterr().out
    assert "ties, scope global, as model" in printed
    assert "beyond mapped files" in printed
    assert [p for p in sorted(here.iterdir()) if p.name != "cache"] == [p for p in before if p.name != "cache"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["merge", "a", "b", "-o", "x"], 2, "no method is given"),
        (["merge", "a", "b", "--method", "teis", "-o", "x"], 2, "did you mean ties?"),
        (["merge", "a", "b", "--ties", "--weights", "1,2,3", "-o", "x"], 2, "--weights has 3 numbers"),
        (
            ["merge", "a", "b", "--ties", "--base", "base", "--density", "2", "-o", "x"],
            2,
            "density is 2, outside [0, 1]",
        ),
        (["merge", "a", "b", "--ties", "--base", "base", "-o", "a"], 1, "the output a exists"),
        (["merge", "a", "--ties", "--base", "base"], 2, "no output is given"),
        (["merge", "a", "--ties", "--set", "elect", "--base", "base", "-o", "x"], 2, "is not NAME=VALUE"),
        (["merge", "--verify", "a"], 1, "name a folder that `steer merge` wrote"),
        (["merge", "a", "--verify", "b"], 2, "--verify takes no inputs, --expr, --recipe or --out"),
        (["diff", "base", "a", "-o", "v.safetensors", "--storage", "lowrank:0"], 2, "there is no storage 'lowrank:0'"),
        (["diff", "base", "a", "-o", "v.bin"], 1, "the name of a task vector must end in .safetensors"),
        (["apply", "base", "v.safetensors", "-o", "x"], 1, "there is no file v.safetensors"),
    ],
)
def test_bad_input_is_one_clear_error(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    assert run(arguments) == code
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "hint: " in printed
    assert "Traceback" not in printed
    assert not Path("x").exists()


def test_methods_are_listed_and_adapters_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "--methods"]) == 0
    assert "breadcrumbs_ties" in capsys.readouterr().out
    assert run(["diff", "base", "a", "--to-lora", "4", "-o", "lora"]) == 0
    assert (
        run(
            [
                "merge",
                "lora",
                "b",
                "--base",
                "base",
                "--method",
                "task_arithmetic",
                "--to-lora",
                "8",
                "-o",
                "lora2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(Path("lora2/adapter_config.json").read_text())["r"] == 8


def test_steering_vectors_are_merged_into_a_steering_vector(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("warm", "calm"):
        SteeringVector({1: torch.randn(16)}, {"base": {"digest": "sha256:x"}}).save(f"{name}.safetensors")
    assert run(["merge", "warm.safetensors", "calm.safetensors", "--ties", "-o", "both.safetensors"]) == 0
    assert SteeringVector.load("both.safetensors").metadata["method"]["name"] == "ties"
    capsys.readouterr()
    assert run(["merge", "warm.safetensors", "calm.safetensors", "--ties", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [1]
    assert run(["merge", "warm.safetensors", "a", "--ties", "-o", "x.safetensors"]) == 2


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from steer.cli import run\n"
        "for c in ('merge', 'diff', 'apply'): run([c, '--help'])\n"
        "print([m for m in ('torch', 'numba', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


def test_the_options_of_the_chosen_method_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "--ties", "--list-options", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["name"] == "ties"
    assert listed["options"]["density"]["range"] == "[0, 1]"
    assert listed["options"]["elect"]["range"] == "before, after"
    assert run(["merge", "--method", "teis", "--list-options"]) == 2
    assert "did you mean ties?" in capsys.readouterr().err
    assert run(["merge", "--list-options"]) == 2
