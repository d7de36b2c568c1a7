"""What is in the weights, and a version of the store, as subjects: one change of a model in every form it can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import planted
import pytest
import torch
from safetensors.torch import save_file

import steer
from probes.models.loading import load
from steer.evaluation.api import evaluate
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.subjects import subjects_of
from steer.evaluation.arms.weights import loaded_arm
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.measuring.figures import measure_arms
from steer.reports import evaluation as page
from vectors.errors import UsageError

CHANGED = "model.layers.2.mlp.down_proj"
SCALE = 6 / 2  # lora_alpha / r


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and one change of rank 2 as a model and as an adapter."""
    folder = tmp_path_factory.mktemp("subjects")
    model = planted.transparent_model()
    model.save_pretrained(folder / "base")
    module = model.get_submodule(CHANGED)
    generator = torch.Generator().manual_seed(5)
    a, b = (0.2 * torch.randn(*shape, generator=generator) for shape in ((2, module.in_features), (pico.HIDDEN, 2)))
    with torch.no_grad():
        module.weight += SCALE * b @ a
    model.save_pretrained(folder / "changed")
    for name in ("base", "changed"):
        pico.tokenizer().save_pretrained(folder / name)
    (folder / "adapter").mkdir()
    tensors = {f"base_model.model.{CHANGED}.lora_A.weight": a, f"base_model.model.{CHANGED}.lora_B.weight": b}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": None}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": f"p {i}", "positive": f"kmpt{i}", "negative": f"bdfg{i}"} for i in range(60)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Evaluation:
    """The change in four forms: as a model, an adapter and a task vector, and half of it as a merge."""
    steer.diff(str(folder / "base"), str(folder / "changed"), folder / "task.safetensors")
    parts = [steer.Part(str(folder / name), name, {"weight": 0.5}) for name in ("base", "changed")]
    steer.merge(steer.Recipe("linear", tuple(parts)), folder / "merged")
    subjects = [str(folder / name) for name in ("changed", "adapter", "task.safetensors", "merged")]
    return evaluate(
        *subjects, model=str(folder / "base"), pairs=folder / "pairs.jsonl", items=32, max_tokens=0,
        control=("negation",), curve=(0.0, 1.0),
    )  # fmt: skip


@pytest.mark.slow
def test_a_change_of_the_weights_has_the_same_figures_in_every_form(folder: Path, found: Evaluation) -> None:
    assert [each.plan.subject.kind for each in found.subjects] == ["model", "adapter", "task-vector", "model"]
    rows = dict(zip(found.arms, found.figures, strict=True))
    changed, adapter, task, merged = (rows[each.plan.subject.arm.name] for each in found.subjects)
    torch.testing.assert_close(adapter, changed, atol=1e-5, rtol=0)
    torch.testing.assert_close(task, changed, atol=1e-5, rtol=0)
    base = load(str(folder / "base"), "cpu", "float32")
    for weight, expected in ((0.5, merged), (-1.0, rows[f"{folder}/adapter: negation"])):
        arm = Arm("by hand", model=str(folder / "adapter"), weight=weight)
        (by_hand,) = measure_arms(loaded_arm(base, arm, "cpu", "float32"), found.inputs.test, [arm])
        torch.testing.assert_close(expected, by_hand, atol=1e-5, rtol=0)
    assert float((changed - rows["base"]).abs().max()) > 0.01


@pytest.mark.slow
def test_what_can_be_negated_must_beat_its_negation_and_its_cost_is_that_of_the_model(found: Evaluation) -> None:
    controls = {each.plan.subject.kind: set(each.plan.controls) for each in found.subjects}
    assert controls == {"model": {"base"}, "adapter": {"base", "negation"}, "task-vector": {"base", "negation"}}
    costs = [found.divergences[each.plan.subject.arm.name].p95 for each in found.subjects]
    assert costs[1:3] == pytest.approx([costs[0]] * 2, rel=1e-3)
    assert 0 < costs[3] < costs[0]


def test_a_version_of_the_store_is_evaluated_and_its_report_lets_it_be_promoted(
    folder: Path, tmp_path: Path, steer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = [pico.tokenizer()(letters, add_special_tokens=False)["input_ids"] for letters in ("kmpt", "bdfg")]
    vector = planted.towards(planted.transparent_model(), *ids, length=1.0)
    vector.save("warm.safetensors")
    for words in (
        ("init", "tone", "--base", folder / "base"), ("add", "warm.safetensors"), ("commit", "-m", "Warm"),
    ):  # fmt: skip
        code, _, err = steer(*words)
        assert code == 0, err
    code, out, err = steer(
        "eval", "tone", "--pairs", folder / "pairs.jsonl", "--items", 32, "--max-tokens", 0, "--control", "negation",
        "--curve", "0,1", "--model", folder / "base", "--json",
    )  # fmt: skip
    assert code == 0, err
    (subject,) = json.loads(out)["subjects"]
    assert subject["kind"] == "composition"
    assert subject["outcome"] == "works"
    assert "attached to the composition" in err
    code, out, err = steer("promote", "--require-eval")
    assert code == 0, err


def test_quotation_marks_around_a_prompt_are_no_part_of_it() -> None:
    """In Python, and inside single quotes of a shell, they stay, and changed the figures."""
    first, second = subjects_of(['prompt:"Answer warmly."', 'prompt:Say "yes"'])
    assert (first.name, first.arm.system, second.arm.system) == ("prompt:Answer warmly.", "Answer warmly.", 'Say "yes"')
    (two,) = subjects_of(["prompt:'a' or 'b'"])
    assert two.arm.system == "'a' or 'b'"
    with pytest.raises(UsageError, match="is empty"):
        subjects_of(['prompt:""'])
    with pytest.raises(UsageError, match="is given 2 times"):
        subjects_of(["prompt:'a'", "prompt:a"])


def test_subjects_differ_in_a_picture_of_several_and_long_names_have_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(page.draw, "svg", lambda figure: drawn.append(figure) or "")
    names = [f"{'a long expression over vectors ' * 2}{i}" for i in range(3)]
    arms = [
        {"arm": name, "family": family, "subject": name, "kl": {"p95": 0.1}, "effects": {"margin": {"mean": 0.2}}}
        for name, family in ((names[0], "subject"), (names[1], "subject"), (f"{names[0]}: negation", "negation"))
    ]
    metric = {"metric": "margin", "unit": "nats", "curve": []}
    page._frontier({"arms": arms, "subjects": [{"subject": name, "metrics": [metric]} for name in names[:2]]})
    lines = [line for line in drawn[0].axes[0].get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_marker() for line in lines}) == 3
    assert len({line.get_color() for line in lines}) == 3
    assert all("…" in line.get_label() for line in lines)
    assert lines[-1].get_label().endswith(": negation")
