"""The journey on the real model: what a new user does, and what the figures must show."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from probes.capture.activations import activations
from probes.data.examples import Example, Message
from probes.intervals import auroc
from probes.models.tokens import Tokens, tokenise
from steer.cli import run

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[2] / "examples" / "data"
PERSONA = Path(__file__).parents[3] / "shared" / "data" / "persona" / "extraversion.jsonl"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return steer.load_model("smollm2")


@pytest.fixture(scope="module")
def warm(smollm2: Any) -> Any:
    """Of all layers, not calibrated: what follows takes strengths of its own, and the README's session calibrates."""
    return steer.extract(DATA / "warm.jsonl", DATA / "cold.jsonl", model=smollm2, budget_kl=0)


def test_the_bundled_model_speaks_english(smollm2: Any) -> None:
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = smollm2.model(input_ids=ids, labels=ids).loss
    assert float(loss) < 2.5  # random weights give log 49152 = 10.8


def test_warm_and_cold_are_told_apart_on_held_out_folds(warm: Any) -> None:
    layer = warm.recommended.layers[0]
    judged = warm.validated[layer]
    assert 8 <= layer <= 24
    assert judged.auroc > 0.99
    assert judged.auroc_low > 0.94  # perfect separation of 80 + 80 shows no more than 0.955
    assert 0.3 < judged.auroc_shuffled < 0.7
    assert judged.cohens_d > 3


def test_the_vector_makes_warm_answers_likelier_the_stronger_it_is(smollm2: Any, warm: Any) -> None:
    rows = [
        [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()] for name in ("warm", "cold")
    ]
    examples = [[Example(row["completion"], row["prompt"]) for row in side[:8]] for side in rows]
    margins = margin_by_strength(smollm2, warm.vector, examples, (-2, 0, 2))
    assert margins == sorted(margins)
    assert margins[-1] - margins[0] > 0.5


@pytest.mark.skipif(not PERSONA.exists(), reason="the persona data is not beside this checkout")
def test_extraversion_statements_do_no_worse_than_a_plain_script(smollm2: Any) -> None:
    rows = [json.loads(line) for line in PERSONA.read_text().splitlines()]
    sides = []
    for answer in (" Yes", " No"):
        statements = [row["statement"] for row in rows if row["answer_matching_behavior"] == answer]
        random.Random(0).shuffle(statements)
        sides.append([Example(s, (Message("user", "Tell me about yourself."),)) for s in statements[:192]])
    train = [[{"prompt": "Tell me about yourself.", "completion": e.completion} for e in side[:128]] for side in sides]
    found = steer.extract(train[0], train[1], model=smollm2, layers="12")
    held_out = [tokenise(side[128:], smollm2.tokenizer) for side in sides]
    direction = found.vector.layers[12]
    scores = []
    for side in held_out:
        pooled = activations(smollm2.model, side, [12])
        with pooled.spill:
            scores.append((pooled.spill.read(0) @ direction).double())
    # Three random splits gave 0.993, 0.993 and (this one) 0.982: 64 + 64 held out leave a standard error near 0.01.
    assert auroc(*scores) > 0.97
    margins = margin_by_strength(smollm2, found.vector, [side[128:160] for side in sides], (-2, 0, 2, 4))
    assert margins == sorted(margins)
    assert margins[-1] - margins[0] > 1.8


def margin_by_strength(
    loaded: Any, vector: Any, examples: list[list[Example]], strengths: tuple[float, ...]
) -> list[float]:
    """The mean log-likelihood per counted token of positive less negative examples, in nats, at each strength."""
    positive, negative = (tokenise(side, loaded.tokenizer) for side in examples)
    margins = []
    for strength in strengths:
        with steer.steered(loaded.model, strength * vector):
            margins.append(likelihood(loaded.model, positive) - likelihood(loaded.model, negative))
    return margins


def likelihood(model: Any, examples: list[Tokens]) -> float:
    """The mean over examples of the mean log-likelihood of their counted tokens, in nats."""
    values = []
    for example in examples:
        ids = torch.tensor([example.ids])
        with torch.inference_mode():
            logs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        counted = torch.tensor(example.counted)
        values.append(float(logs[counted - 1, ids[0, counted]].mean()))
    return sum(values) / len(values)


def test_try_gives_other_texts_at_other_strengths_and_the_plain_one_at_zero(smollm2: Any, warm: Any) -> None:
    composition, vectors = steer.compose("warm", {"warm": warm.vector})
    row = steer.try_strengths(
        smollm2, composition, vectors, ["How was your day?"], [-2, 0, 2], max_tokens=20, temperature=0
    )[0]
    assert len(set(row)) == 3
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How was your day?"}], tokenize=False, add_generation_prompt=True
    )
    inputs = smollm2.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        plain = smollm2.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert (
        row[1] == smollm2.tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )


def test_the_session_of_the_readme_is_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, but for the digest and the texts, which follow from last bits that machines do not share."""
    root = DATA.parents[1]
    session = (root / "README.md").read_text().partition("```console\n$ source")[2].partition("```")[0]
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    commands = session.split("\n$ steer ")[1:]
    assert [command.split()[0] for command in commands] == ["extract", "try"]
    for shown in commands:
        line, _, expected = shown.partition("\n")
        assert run(shlex.split(line)) == 0
        printed = capsys.readouterr().out
        if line.startswith("extract"):
            assert without_digests(printed.strip()) == without_digests(expected.strip())
        else:
            assert printed.split("\n")[:5] == expected.split("\n")[:5]


def without_digests(text: str) -> str:
    return re.sub("sha256:[0-9a-f]{64}", "sha256:", text)
