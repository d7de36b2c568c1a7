"""`steer eval` with scorers, a judge, hand labels and exports: what is asked for stands in the report, or why not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import planted
import pytest
from judge_server import asked, judge

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which a vector works, the vector, and pairs with prompts."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = planted.transparent_model()
    model.save_pretrained(folder / "model")
    pico.tokenizer().save_pretrained(folder / "model")
    ids = [
        [pico.tokenizer()(letter, add_special_tokens=False)["input_ids"][0] for letter in side] for side in ("km", "bd")
    ]
    planted.towards(model, *ids, length=30.0).save(folder / "warm.safetensors")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            file.write(
                json.dumps({"prompt": f"prompt {i}", "positive": "kmkm" + str(i), "negative": "bdbd" + str(i)}) + "\n"
            )
    (folder / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(6)))
    lines = [{"prompt": "p", "response": text, "label": label} for text, label in (("bb", "yes"), ("kk", "no"))]
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(line) for line in lines * 15))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    files = ["--pairs", str(folder / "pairs.jsonl"), "--prompts", str(folder / "prompts.txt")]
    quick = ["--model", str(folder / "model"), "--max-tokens", "4", "--control", "negation", "--curve", "1"]
    return ["eval", str(folder / "warm.safetensors"), *files, *quick, *more]


def test_rates_judge_labels_and_exports_stand_in_the_report(steer: Run, folder: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        return "Better: [[1]]" if asked(body).startswith("Two") else "Rating: [[1]]"

    out = tmp_path / "out"
    with judge(answer) as server:
        (tmp_path / "key").write_text("sk-secret")
        more = ["--scorer", "begins=regex:^b", "--judge", server.url, "--judge-model", "m", "--concept", "warmth"]
        more += ["--judge-key-file", str(tmp_path / "key"), "--labels", str(folder / "labels.jsonl"), "--out", str(out)]
        code, printed, errors = steer(*arguments(folder, *more, "--export", "inspect", "--export", "lm-eval"))
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    words, judged = report["scores"]
    assert words["name"] == "begins"
    subject = next(name for name in words["arms"] if name != "base")
    # The base writes b after every prompt, and the subject does not.
    assert (words["arms"]["base"]["rate"]["mean"], words["arms"][subject]["rate"]["mean"]) == (1.0, 0.0)
    assert words["arms"][subject]["difference"]["mean"] == -1.0
    assert words["agreement"]["matrix"] == [[15, 0], [0, 15]]
    assert judged["arms"][subject]["rate"]["mean"] == 1.0  # the harmonic mean of three ratings of 1
    assert judged["arms"][subject]["preferred"]["abstained"] == 6  # it always prefers the first
    assert "begins: Cohen's kappa 1.00" in printed
    assert "confusion matrix" in printed
    assert "judge: Cohen's kappa 0.00" in printed  # it says yes to everything
    record = json.loads((out / "run.json").read_text())
    assert record["inputs"]["scorers"]["labels"].startswith("sha256:")
    assert {"lm-eval.pt"} | {f"inspect/{path.name}" for path in (out / "inspect").iterdir()} <= set(record["outputs"])
    assert len(list((out / "inspect").iterdir())) == len(report["arms"])
    assert not any("sk-secret" in path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    page = (out / "report.html").read_text()
    assert "Scores of the answers" in page
    assert "Cohen&#x27;s kappa 1.00" in page


def test_without_labels_the_judge_is_called_not_validated_and_when_down_its_scores_are_missing(
    steer: Run, folder: Path, tmp_path: Path
) -> None:
    with judge(lambda _: "") as server:
        (tmp_path / "judge.yaml").write_text(f"url: {server.url}\nmodel: m\nattempts: 1\n")
    more = ["--judge", str(tmp_path / "judge.yaml"), "--concept", "warmth"]
    code, printed, errors = steer(*arguments(folder, *more))
    assert code == 0, errors
    assert "judge not validated: no hand labels (--labels FILE)" in printed
    assert "judge: 12 of 12 scores are missing: the judge can't be reached" in printed


def test_all_problems_of_scorers_are_reported_with_those_of_other_inputs(steer: Run, folder: Path) -> None:
    more = ["--scorer", "regex:(", "--scorer", "regx:a", "--judge", "ftp://x", "--labels", "nothing.jsonl"]
    code, _, errors = steer(*arguments(folder, *more, "--export", "inspect", "--donor", "none.safetensors"))
    assert code == 2
    for part in ("not a regular expression", "no scorer 'regx'", "needs a concept", "nothing.jsonl can't be read",
                 "--export writes into", "none.safetensors"):  # fmt: skip
        assert part in errors


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
def test_a_task_stands_in_the_report_with_the_paired_difference_from_the_base(
    steer: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text("".join(f'{{"question": "q{i}", "answer": {i % 2}}}\n' for i in range(6)))
    (tmp_path / "task.yaml").write_text(
        f"task: planted\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["k", "b"]\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    code, printed, errors = steer(
        *arguments(folder, "--json", "--tasks", str(tmp_path / "task.yaml"), "--max-tokens", "0")
    )
    assert code == 0, errors
    base, subject = json.loads(printed)["tasks"]
    assert (base["task"], base["metric"], base["documents"]) == ("planted", "acc", 6)
    assert base["difference"] is None
    assert subject["difference"]["mean"] == pytest.approx(subject["value"] - base["value"])
    assert subject["value"] == 0.5  # the vector prefers k everywhere
