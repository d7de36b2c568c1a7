"""Scorers of generated texts: planted texts with known rates, and settings that are checked before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from judge_server import asked, judge

from steer.evaluation import scorers
from steer.evaluation.scorers import GeneratedText, Resources, Scored, configured, parse, rate
from vectors.errors import SteerError, UsageError

NONE = Resources()


def texts(*responses: str) -> list[GeneratedText]:
    return [GeneratedText("Say something.", response) for response in responses]


def values(scorer: Any, *responses: str, resources: Resources = NONE) -> list[float | None]:
    return [each.value for each in scorer.score(texts(*responses), resources)]


def test_a_regular_expression_may_match_anywhere_and_in_any_case() -> None:
    assert values(parse(r"regex:\bsorry\b"), "I am SORRY.", "sorrynot", "") == [1, 0, 0]
    assert values(configured({"kind": "regex", "pattern": "sorry", "ignore_case": False}, Path()), "Sorry") == [0]
    assert parse("regex:a=b:c").settings.pattern == "a=b:c"
    assert parse("apology=regex:x").name == "apology"


def test_words_are_whole_words_and_phrases_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "warm.txt").write_text("# warm words\nthank you\nGlad  # to help\nC++\nstraße\n")
    scorer = configured({"kind": "words", "file": "warm.txt"}, tmp_path)
    assert values(scorer, "Thank\nyou!", "gladly", "GLAD.", "I like C++.", "STRASSE", "cold") == [1, 0, 1, 1, 1, 0]
    twice = configured({"kind": "words", "words": ["glad"], "at_least": 2}, Path())
    assert values(twice, "glad", "glad, so glad") == [0, 1]


def test_the_rate_of_a_judge_is_the_harmonic_mean_and_its_causes_of_missing_scores_are_counted() -> None:
    def answer(body: dict[str, Any]) -> str | tuple[int, dict[str, str], bytes]:
        text = asked(body)
        if "[response]\nnonsense" in text:
            return "What a lovely text!"
        if "[response]\nrefused" in text:
            return 400, {}, b"no"
        return "Rating: [[1]]" if text.startswith("You rate how clearly") else "Rating: [[2]]"

    with judge(answer) as server:
        settings = {"kind": "judge", "judge": server.url, "model": "m", "concept": "warmth"}
        scored = configured(settings, Path()).score(texts("good", "nonsense", "refused", "fine"), NONE)
    assert [each.value for each in scored] == [1.5, None, None, 1.5]
    assert scored[0].evidence == {"concept": 1, "instruction": 2, "fluency": 2}
    assert scored[0].decision == 1
    assert scored[1].evidence["unreadable"]["concept"] == "What a lovely text!"
    summary = rate(scored)
    assert (summary.mean, summary.scored) == (1.5, 2)
    assert summary.missing == {"the judge gave no rating": 1, "the judge answers with HTTP 400: no": 1}


def test_a_judge_that_is_down_leaves_every_score_missing(tmp_path: Path) -> None:
    with judge(lambda _: "") as server:
        lines = [f"url: {server.url}", "model: m", "attempts: 2", "backoff: 0.01"]
    (tmp_path / "judge.yaml").write_text("\n".join(lines))
    settings = {"kind": "judge", "judge": str(tmp_path / "judge.yaml"), "concept": "warmth"}
    scored = configured(settings, Path()).score(texts("good"), NONE)
    assert rate(scored) == (None, None, 0, {scored[0].reason: 1})
    assert "can't be reached" in scored[0].reason


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose decision is planted: the head reads the last token's hidden state, and weights one side."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    settings = pico.config("llama", num_labels=2, id2label={0: "cold", 1: "warm"}, label2id={"cold": 0, "warm": 1})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(settings)
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def test_a_classifier_gives_the_probabilities_that_the_model_gives_to_each_text_alone(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    responses = ["the warm is and the cold", "no", "and and and", "warm"]
    scorer = configured({"kind": "classifier", "model": str(classifier), "label": "WARM"}, Path())
    scored = scorer.score(texts(*responses), Resources(device="cpu"))
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for each, response in zip(scored, responses, strict=True):
        with torch.no_grad():
            logits = model(**pico.tokenizer()(response, return_tensors="pt")).logits[0]
        probability = float(logits.softmax(-1)[1])
        assert each.evidence["probability"] == pytest.approx(probability, abs=1e-5)
        assert each.value == float(probability >= 0.5)


def test_a_classifier_is_checked_before_its_weights_are_loaded(classifier: Path, model_folder: Path) -> None:
    with pytest.raises(UsageError, match="no label 'hot'; it has cold, warm"):
        configured({"kind": "classifier", "model": str(classifier), "label": "hot"}, Path())
    with pytest.raises(UsageError, match="is not a sequence classifier: it is LlamaForCausalLM"):
        parse(f"classifier:{model_folder}")
    assert parse(f"classifier:{classifier}").settings.label == ""


@pytest.mark.parametrize(
    ("entry", "problems"),
    [
        ({"kind": "regx"}, ["no scorer 'regx'"]),
        ({"kind": "regex", "pattern": "("}, ["not a regular expression"]),
        ({"kind": "regex", "patern": "x", "ignore_case": 1},
         ["no setting 'patern' (did you mean pattern?)", "ignore_case is 1, not true or false", "regex needs pattern"]),
        ({"kind": "words"}, ["needs either file or words"]),
        ({"kind": "words", "words": ["a"], "at_least": 0}, ["at least 1"]),
        ({"kind": "words", "file": "nothing.txt"}, ["nothing.txt can't be read"]),
        ({"kind": "judge", "judge": "http://h/v1", "concept": "c"}, ["judge.model is missing"]),
        ({}, ["has no kind"]),
    ],
)  # fmt: skip
def test_all_problems_of_a_scorer_are_reported_at_once(entry: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(SteerError) as caught:
        configured(entry, Path())
    assert all(problem in str(caught.value) for problem in problems)


def test_a_rate_has_wilsons_interval_which_has_a_width_at_the_ends_too() -> None:
    summary = rate([Scored(1.0)] * 10)
    assert summary.mean == 1
    assert summary.interval == pytest.approx((0.7225, 1.0), abs=1e-4)  # Wilson 1927, 10 of 10
    half = rate([Scored(float(i % 2)) for i in range(100)])
    assert half.interval == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_texts_of_one_group_count_as_fewer() -> None:
    scored = [Scored(float(i >= 20)) for i in range(40)]  # two groups, each all alike
    alone = rate(scored).interval
    together = rate(scored, groups=["a"] * 20 + ["b"] * 20).interval
    assert alone is not None
    assert together is not None
    assert together[0] < 0.1 < 0.9 < together[1]
    assert 0.3 < alone[0] < 0.5 < alone[1] < 0.7


def test_every_built_in_scorer_keeps_the_contract() -> None:
    assert {"classifier", "judge", "probe", "regex", "words"} <= set(scorers.available()) == set(scorers.kinds())


def test_a_probe_reads_the_activations_of_the_response_in_the_unsteered_model(
    model_folder: Path, tmp_path: Path
) -> None:
    from probes.models.loading import load
    from vectors.probe import Probe, Readout

    loaded = load(model_folder, "cpu", "float32")
    weight = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(0))
    Probe({1: Readout(weight, 0.25)}, {"base": loaded.identity}).save(tmp_path / "p.safetensors")
    scorer = configured({"kind": "probe", "file": "p.safetensors"}, tmp_path)
    prompt, responses = "Say something.", ["the warm and the cold", "", "no no"]
    scored = scorer.score([GeneratedText(prompt, each) for each in responses], Resources(loaded=loaded))
    assert scored[1] == Scored(None, reason="the response holds no token that counts")
    for each, response in ((scored[0], responses[0]), (scored[2], responses[2])):
        messages = [{"role": "user", "content": prompt}]
        before = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = len(loaded.tokenizer(before, add_special_tokens=False)["input_ids"])
        ids = loaded.tokenizer(before + response, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = loaded.model(ids, output_hidden_states=True).hidden_states[2][0, start:]
        expected = float((states @ weight).mean() + 0.25)
        assert each.evidence["score"] == pytest.approx(expected, abs=1e-4)
        assert each.value == float(expected > 0)


def test_a_probe_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    from probes.models.loading import load
    from vectors.probe import Probe, Readout

    loaded = load(model_folder, "cpu", "float32")
    other = {"digest": "sha256:" + "0" * 64, "name": "other", "architecture": "LlamaForCausalLM"}
    Probe({1: Readout(torch.ones(pico.HIDDEN), 0.0)}, {"base": other}).save(tmp_path / "p.safetensors")
    scorer = configured({"kind": "probe", "file": str(tmp_path / "p.safetensors")}, Path())
    with pytest.raises(UsageError, match="was trained on other"):
        scorer.score(texts("a"), Resources(loaded=loaded))
    with pytest.raises(SteerError, match="holds no layer 3"):
        configured({"kind": "probe", "file": str(tmp_path / "p.safetensors"), "layer": 3}, Path())
