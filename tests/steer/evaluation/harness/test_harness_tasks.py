"""Tasks of lm-evaluation-harness: where it is installed, on local tasks with local data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from probes.interventions import no_intervention, steering
from probes.logits import logits_of
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, load
from steer.evaluation.arms.arm import Arm
from vectors.errors import UsageError
from vectors.expression import parse
from vectors.steering import SteeringVector

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")

CHOICE = """
task: warmth
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load(model_folder, "cpu", "float32")


@pytest.fixture
def steered_arm() -> Arm:
    generator = torch.Generator().manual_seed(1)
    vector = SteeringVector({2: torch.randn(pico.HIDDEN, generator=generator)})
    return Arm("v", composition=parse("2*v"), vectors={"v": vector})


def task_file(folder: Path, text: str) -> str:
    data = folder / "data.jsonl"
    questions = ["Is the warm one the warm one?", "Is the cold one the warm one?", "Is it the other way around?"]
    data.write_text("\n".join(json.dumps({"question": q, "answer": i % 2}) for i, q in enumerate(questions)))
    file = folder / "task.yaml"
    file.write_text(text.replace("FILE", str(data)))
    return str(file)


def requests_of(pairs: list[tuple[str, Any]], kind: str = "loglikelihood") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


@installed
def test_its_likelihoods_are_those_of_the_harness_where_nothing_steers(loaded: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    from steer.evaluation.harness.language_model import language_model

    pairs = [("the warm and", " the cold"), ("", "the is"), ("is it warm? ", "yes"), ("a", " and" * 40)]
    ours = language_model(loaded, no_intervention)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2)
    for mine, other in zip(
        ours.loglikelihood(requests_of(pairs)), theirs.loglikelihood(requests_of(pairs)), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    long = [("the warm and the cold is " * 60,)]  # more than the context: cut into windows
    rolling = requests_of(long, "loglikelihood_rolling")
    (mine,), (other,) = ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    assert mine == pytest.approx(other, rel=0.01)  # windows are one token shorter
    asked = requests_of([("the warm", {"until": ["the"], "max_gen_toks": 6})] * 2, "generate_until")
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@installed
def test_its_likelihoods_are_those_of_our_hooks_where_a_vector_steers(loaded: LoadedModel, steered_arm: Arm) -> None:
    from steer.evaluation.harness.language_model import language_model

    for expression in ("2*v", "2*v@response"):
        assert steered_arm.vectors
        intervention = steering(loaded.model, expression, dict(steered_arm.vectors))
        lm = language_model(loaded, intervention)
        ((likelihood, _),) = lm.loglikelihood(requests_of([("the warm and", " the cold")]))
        ids, whole = (loaded.tokenizer(text)["input_ids"] for text in ("the warm and", "the warm and the cold"))
        completion = Completion(ids, whole[len(ids) :])
        logits = logits_of(loaded.model, completion, intervention).double().log_softmax(-1)
        expected = sum(float(logits[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
        assert likelihood == pytest.approx(expected, abs=1e-5)


@installed
def test_a_local_task_is_run_on_every_arm_with_its_samples(
    loaded: LoadedModel, steered_arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.evaluation.harness.tasks import measure_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base, other = measure_tasks(loaded, [task_file(tmp_path, CHOICE)], [Arm("base"), steered_arm])
    for figures in (base, other):
        (accuracy,) = [each for each in figures if each.metric == "acc"]
        assert accuracy.task == "warmth"
        assert accuracy.higher_is_better is True
        assert set(accuracy.samples) == {0, 1, 2}
        assert accuracy.value == pytest.approx(sum(accuracy.samples.values()) / 3)
    again, _ = measure_tasks(loaded, [task_file(tmp_path, CHOICE)], [Arm("base"), Arm("base")])
    assert again == base


@installed
def test_a_task_that_is_answered_in_words_runs_too(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.evaluation.harness.tasks import measure_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ((match, *_),) = measure_tasks(loaded, [task_file(tmp_path, WRITE)], [Arm("base")], limit=2)
    assert match.metric == "exact_match"
    assert set(match.samples) == {0, 1}


@installed
def test_unknown_tasks_are_refused_all_at_once_before_a_model_runs() -> None:
    from steer.evaluation.harness.tasks import require_tasks

    with pytest.raises(UsageError) as caught:
        require_tasks(["arc_eazy", "hellaswag", "nothing.yaml"])
    assert caught.value.problems[0] == "lm-evaluation-harness has no task 'arc_eazy' (did you mean arc_easy?)"
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra eval is installed")
def test_without_the_harness_the_extra_is_named() -> None:
    from steer.evaluation.harness.tasks import require_tasks

    with pytest.raises(UsageError, match="not installed") as caught:
        require_tasks(["arc_easy"])
    assert "[eval]" in caught.value.hint
