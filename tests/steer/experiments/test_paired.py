"""Paired experiments on a pico model: planted arms, votes of a planted judge and of a person, and the folder."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent.parent))

from judge_server import asked, judge

from steer.cli import run
from steer.cli.output import out
from steer.evaluation import scorers
from steer.experiments.paired.answers import Row
from steer.experiments.paired.figures import Cut, compared, verdict_of
from steer.experiments.paired.ranking import pairings, strengths
from steer.experiments.paired.report import _votes
from steer.experiments.paired.votes import Vote
from steer.experiments.specification import Metric
from steer.reports import paired as pages
from vectors.documents import yaml_text
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

Paired = Callable[..., tuple[int, Any]]
PROMPTS = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model; `end` ends an answer at once, `warm` is some direction; and prompts."""
    folder = tmp_path_factory.mktemp("paired")
    model = pico.save(folder / "model")
    end = load_file(next(model.glob("*.safetensors")))["lm_head.weight"][2].float()
    SteeringVector({3: 400 * end / end.norm()}).save(folder / "end.safetensors")
    generator = torch.Generator().manual_seed(5)
    SteeringVector({1: torch.randn(pico.HIDDEN, generator=generator)}).save(folder / "warm.safetensors")
    lines = [json.dumps(f"the warm and the cold {i}") for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "few.jsonl").write_text("\n".join(lines[:5]))
    return folder


def write(folder: Path, arms: dict[str, Any], **changes: Any) -> None:
    metric = {"name": "response_tokens", "better": "lower", "smallest_effect": 1}
    values = {"name": "tone", "salt": "s", "model": str(folder / "model"), "metric": metric, "arms": arms, **changes}
    (folder / "tone.yaml").write_text(json.dumps(values))


@pytest.fixture
def paired(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Paired:
    """Runs `steer ab paired` into `out` of this test; returns the status and the JSON object."""
    monkeypatch.chdir(made)

    def call(*words: str, prompts: str = "prompts.jsonl") -> tuple[int, Any]:
        given = ["--prompts", prompts, "--engine", "transformers", "--max-tokens", "6", "-o", str(tmp_path / "out")]
        status = run(["ab", "paired", "tone", *given, *words, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


BRIEF = {"control": {}, "brief": {"steer": "end"}, "twin": {"steer": "0*warm"}}


def test_the_shorter_arm_is_better_and_its_twin_writes_what_the_control_writes(
    made: Path, paired: Paired, tmp_path: Path
) -> None:
    write(made, BRIEF)
    status, report = paired()
    assert status == 0, report
    verdicts = {each["arm"]: each["verdict"] for each in report["verdicts"]}
    assert verdicts == {"brief": "better", "twin": "cut off"}  # all answers of the twin and the control are cut
    (length,) = (each for each in report["measures"] if each["main"])
    assert length["arms"]["brief"]["mean"] < 1.1  # the end token, in nearly all
    gain = length["arms"]["brief"]["difference"]
    means = [length["arms"][name]["mean"] for name in ("brief", "control")]
    assert gain["mean"] == pytest.approx(means[0] - means[1])
    assert gain["low"] <= gain["mean"] <= gain["high"] < 0
    for measure in report["measures"]:  # the same random numbers, so the same texts, whatever the measure
        twin = measure["arms"]["twin"]["difference"]
        assert (twin["mean"], twin["low"], twin["high"], twin["p"]) == (0, 0, 0, 1)
    assert report["confidence"] == 0.975  # two arms against the control, together at 95 %
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"] == "ab paired"
    assert set(record["outputs"]) == {"answers.json", "report.json", "report.html"}


def test_markers_that_are_given_tell_the_sections_of_answers_and_belong_to_the_answers(
    made: Path, paired: Paired, tmp_path: Path
) -> None:
    write(made, {"control": {}, "brief": {"steer": "end@answer"}})
    status, refused = paired(prompts="few.jsonl")
    assert status != 0
    assert "--steer-markers thinking=BEGIN,END" in refused["hint"]

    def tokens(markers: str, *words: str) -> float:
        status, report = paired("--steer-markers", f"thinking={markers}", *words, prompts="few.jsonl")
        assert status == 0, report
        (length,) = (each for each in report["measures"] if each["main"])
        return float(length["arms"]["brief"]["mean"])

    steered = tokens("warm,cold")  # the prompt ends behind its thinking, so the answer is steered throughout
    assert steered < 3
    status, refused = paired("--steer-markers", "thinking=cold,warm", prompts="few.jsonl")
    assert status != 0
    assert "they differ in markers" in refused["error"]
    assert tokens("cold,warm", "--force") > steered + 1  # it ends inside its thinking
    problem = paired("--steer-markers", "mood=a,b", prompts="few.jsonl")[1]["error"]
    assert "'mood=a,b' is not thinking or tools" in problem


def test_arms_with_conditions_act_where_these_hold_and_a_probe_judges_the_answers(
    made: Path, paired: Paired, tmp_path: Path
) -> None:
    probe = Probe({1: Readout(torch.ones(pico.HIDDEN), 0.0)})
    probe.save(made / "mood.safetensors")
    arms = {"control": {}, "open": {"steer": "end@when:mood>-1000"}, "closed": {"steer": "end@when:mood>1000"}}
    metrics = {"secondary": [{"name": "mood", "kind": "number"}, {"name": "high"}]}
    judges = [
        {"name": "mood", "scorer": "probe:mood.safetensors"},
        {"name": "high", "scorer": "probe:mood.safetensors"},
    ]
    write(made, arms, **metrics, judges=judges)
    status, report = paired(prompts="few.jsonl")
    assert status == 0, report
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())["answers"]
    assert [each["text"] for each in answers["closed"]] == [each["text"] for each in answers["control"]]
    for name, held in (("open", 1), ("closed", 0)):
        for each in answers[name]:
            (gate,) = each["gates"]
            assert (gate["held"], gate["read"], gate["condition"][:11]) == (held, 1, "@when:mood>")
    assert {each["gates"] for each in answers["control"]} == {None}
    # The first token is written at the end of the prompt, where no condition acts; then comes the end token.
    assert max(len(each["ids"]) for each in answers["open"]) <= 3 < max(len(each["ids"]) for each in answers["control"])
    scores = {each["name"]: each["arms"]["control"]["mean"] for each in report["measures"]}
    assert 0 <= scores["high"] <= 1
    assert scores["mood"] != scores["high"]  # of a number the score itself


def test_fewer_than_30_prompts_give_figures_and_no_verdict(made: Path, paired: Paired) -> None:
    write(made, BRIEF)
    _, report = paired(prompts="few.jsonl")
    assert {each["verdict"] for each in report["verdicts"]} == {"too few prompts"}
    assert report["measures"][0]["arms"]["brief"]["difference"]["mean"] < 0
    assert any("5 prompts give figures and no verdict" in note for note in report["notes"])


def test_samples_of_a_prompt_are_one_cluster(made: Path, paired: Paired) -> None:
    write(made, BRIEF)
    _, report = paired("--samples", "8", prompts="few.jsonl")
    gain = report["measures"][0]["arms"]["brief"]["difference"]
    assert (gain["items"], gain["clusters"]) == (40, 5)


def test_a_system_prompt_is_an_arm_and_its_answers_are_scored_without_it(made: Path, paired: Paired) -> None:
    write(made, {"control": {}, "prompt": {"system": "be warm"}})
    _, report = paired("--scorer", "long=regex:.{4}", prompts="few.jsonl")
    names = [each["name"] for each in report["measures"]]
    assert names == ["response_tokens", "characters", "repetition", "refusal", "likelihood", "long"]
    assert report["examples"][0]["answers"]["prompt"] != report["examples"][0]["answers"]["control"]


def test_a_judge_votes_in_both_orders_and_equal_texts_are_ties(made: Path, paired: Paired) -> None:
    """The planted judge prefers the shorter text, wherever it stands."""
    write(made, BRIEF)

    def shorter(body: dict[str, Any]) -> str:
        one, two = (asked(body).split(f"[response {i}]")[1].split(f"[/response {i}]")[0] for i in (1, 2))
        return f"Better: [[{'1' if len(one) < len(two) else '2'}]]"

    with judge(shorter) as server:
        status, report = paired("--judge", server.url, "--judge-model", "m", "--concept", "brevity")
    assert status == 0, report
    pairs = {(each["first"], each["second"]): each for each in report["votes"]["pairs"]}
    assert pairs["control", "twin"]["ties"] == PROMPTS
    assert pairs["control", "twin"]["verdict"] == "undecided"
    brief = pairs["control", "brief"]
    assert (brief["second_won"], brief["rate"], brief["verdict"]) == (PROMPTS, 1.0, "brief")
    assert brief["low"] > 0.8
    strength = {each["arm"]: each for each in report["votes"]["strengths"]}
    assert strength["brief"]["low"] > 1
    assert strength["twin"]["strength"] == pytest.approx(0, abs=1e-3)


def test_votes_that_are_missing_have_reasons_and_no_interval_and_a_judge_is_not_forgotten_silently(
    made: Path, paired: Paired
) -> None:
    write(made, {"control": {}, "warm": {"steer": "4*warm"}})
    with judge(lambda _: "purple") as server:
        status, report = paired("--judge", server.url, "--judge-model", "m", "--concept", "x", prompts="few.jsonl")
    assert status == 0, report
    (pair,) = report["votes"]["pairs"]
    missing = report["votes"]["missing"]["unreadable"]
    assert (pair["rate"], pair["low"], pair["high"]) == (None, None, None)
    assert f"{missing} votes are missing: unreadable." in report["notes"]
    (_, (row,)) = pages.vote_tables(report)["Blind votes"]
    assert row[1:3] == ["-", "-"]
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        assert paired(prompts="few.jsonl")[1]["votes"] is None
    assert "has votes of a judge" in shown.getvalue()


def test_votes_hold_together_over_all_pairs_and_the_tables_say_the_level() -> None:
    arms = ["control", "b", "c", "d"]
    votes = [vote(i, *pair, (1, -1, 0)[i % 3]) for pair in itertools.combinations(arms, 2) for i in range(40)]
    voted = _votes(arms, votes, 0, 1 - 0.05 / 3)
    assert voted is not None
    assert voted["confidence"]["pairs"] == pytest.approx(1 - 0.05 / 6)
    tables = pages.vote_tables({"votes": voted})
    assert "99.2% interval" in tables["Blind votes"][0]
    assert "98.3% interval" in tables["Strengths (Bradley and Terry)"][0]


def test_prompts_that_are_repeated_are_counted(made: Path, paired: Paired) -> None:
    write(made, BRIEF)
    (made / "twice.jsonl").write_text('"warm"\n"cold"\n"warm"\n"warm"')
    _, report = paired(prompts="twice.jsonl")
    assert report["prompts"] == 2
    assert "2 lines of the file repeat a prompt, and are left out." in report["notes"]


def test_a_person_votes_blind_and_goes_on_where_they_were(
    made: Path, paired: Paired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(made, {"control": {}, "warm": {"steer": "4*warm"}})
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\nwhat\nt\nq\n"))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    status, report = paired("--vote", prompts="few.jsonl")
    assert status == 0, report
    assert report["votes"]["by"] == {"person": 2}
    assert "better: 1, 2, t (a tie)" in shown.getvalue()
    assert "warm\n" not in shown.getvalue().replace("the warm and", "")  # nothing names an arm
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n2\n1\n"))
    ended: list[str] = []  # no progress bar below a question, also where the answers are there already
    monkeypatch.setattr(out, "end_stage", lambda: ended.append(shown.getvalue()))
    _, again = paired("--vote", prompts="few.jsonl")
    assert "1 of 3" in shown.getvalue()
    assert len(ended) == 1
    assert "1 of 3" not in ended[0]
    assert again["votes"]["by"] == {"person": 5}
    lines = [json.loads(line) for line in (tmp_path / "out" / "votes.jsonl").read_text().splitlines()]
    assert len({(each["prompt"], each["first"], each["second"]) for each in lines}) == 5
    assert {each["left"] for each in lines} == {"control", "warm"}  # sides are shuffled


def test_a_folder_of_other_answers_is_refused_and_its_own_are_not_written_again(
    made: Path, paired: Paired, tmp_path: Path
) -> None:
    write(made, BRIEF)
    paired(prompts="few.jsonl")
    before = (tmp_path / "out" / "answers.json").stat().st_mtime_ns
    assert paired(prompts="few.jsonl")[0] == 0
    assert (tmp_path / "out" / "answers.json").stat().st_mtime_ns == before
    status, refused = paired("--seed", "1", prompts="few.jsonl")
    assert (status, "they differ in seed" in refused["error"]) == (1, True)
    assert paired("--seed", "1", "--force", prompts="few.jsonl")[0] == 0
    (tmp_path / "out" / "answers.json").write_text('{"identity": {}, "answers": {"control": [{"text": 1}]}}')
    assert "is damaged" in paired("--seed", "1", prompts="few.jsonl")[1]["error"]


def test_all_problems_are_reported_before_a_model_is_loaded(made: Path, paired: Paired) -> None:
    write(made, BRIEF)
    (made / "bad.jsonl").write_text('{"text')
    _, refused = paired("--concept", "x", "--scorer", "nothing:x", "--dtype", "int3", prompts="bad.jsonl")
    assert len(refused["problems"]) >= 4, refused
    assert any("there is no judge" in problem for problem in refused["problems"])


def test_nothing_that_a_prompt_or_an_answer_holds_is_markup_of_the_page(
    made: Path, paired: Paired, tmp_path: Path
) -> None:
    write(made, BRIEF)
    (made / "odd.jsonl").write_text(json.dumps("<script>alert(1)</script> & 'x'"))
    paired(prompts="odd.jsonl")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_experiment_of_the_demo_counts_warm_words() -> None:
    demo = Path(__file__).parents[3] / "examples" / "demo.py"
    text = next(
        node.value.value
        for node in ast.parse(demo.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "EXPERIMENT"  # type: ignore[attr-defined]
    )
    (entry,) = yaml_text.parse(text.format(expression="warm"))["judges"]
    texts = [scorers.GeneratedText("Hello", response) for response in ("I am so GLAD to hear it!", "Noted.")]
    scored = scorers.parse(entry["scorer"]).score(texts, scorers.Resources())
    assert [each.value for each in scored] == [1, 0]


def vote(prompt: int, first: str, second: str, winner: int | None) -> Vote:
    return Vote(prompt, first, second, winner, "judge", reason="order" if winner is None else "")


def test_a_rate_counts_ties_half_and_leaves_out_abstentions() -> None:
    votes = [vote(i, "a", "b", winner) for i, winner in enumerate([-1, -1, -1, 1, 0, 0, None])]
    (pair,) = pairings(["a", "b"], votes)
    assert (pair.second_won, pair.first_won, pair.ties, pair.abstained, pair.missing) == (3, 1, 2, 1, 0)
    assert pair.rate == pytest.approx(4 / 6)


def test_strengths_are_those_of_a_planted_bradley_terry_model() -> None:
    arms, planted = ["control", "b", "c"], {"control": 0.0, "b": 1.0, "c": -0.7}
    generator = torch.Generator().manual_seed(3)
    votes = []
    for prompt in range(600):
        for first, second in itertools.combinations(arms, 2):
            wins = torch.sigmoid(torch.tensor(planted[first] - planted[second]))
            winner = 1 if torch.rand((), generator=generator) < wins else -1
            votes.append(vote(prompt, first, second, winner))
    for each in strengths(arms, votes, resamples=200):
        assert each.low < planted[each.arm] < each.high
        assert each.high - each.low < 0.6


def test_an_arm_that_wins_every_vote_has_a_finite_strength() -> None:
    votes = [vote(i, "a", "b", -1) for i in range(10)] + [vote(i, "a", "c", 0) for i in range(10)]
    found = {each.arm: each for each in strengths(["a", "b", "c"], votes, resamples=20)}
    assert 1 < found["b"].strength < 10
    assert found["b"].high < 20


WHOLE = Cut(0.0, 0.0, 60)


@pytest.mark.parametrize(
    ("cut", "arm", "verdict"),
    [
        (Cut(1.0, 1.0, 24), "twin", "cut off"),
        (Cut(0.05, 0.05, 24), "twin", "no difference"),
        (Cut(0.05, 0.2, 24), "twin", "cut off"),
        (Cut(0.05, 0.2, 24), "brief", "better"),  # the control's answers are longer still
        (Cut(0.2, 0.2, 24), "brief", "cut off"),
        (Cut(0.2, 0.05, 24), "long", "worse"),
    ],
)
def test_answers_that_are_cut_give_no_verdict_on_lengths_unless_the_difference_can_only_be_greater(
    cut: Cut, arm: str, verdict: str
) -> None:
    rows = [Row(i, 0) for i in range(40)]
    scores: dict[str, list[float | None]] = {
        name: [24.0 + shift + i % 2 * (shift != 0) for i in range(40)]
        for name, shift in {"control": 0, "twin": 0, "brief": -9, "long": 9}.items()
    }
    gain = compared(scores, rows, "control", 0, 0.95)[arm].difference
    found = verdict_of(arm, Metric("response_tokens", "number", "lower", smallest_effect=1), gain, cut)
    assert found.verdict == verdict
    if verdict == "cut off":
        assert f"{cut.arm:.0%} of its answers and {cut.control:.0%} of the control's" in found.reason
        assert "raise --max-tokens above 24" in found.reason
    other = verdict_of(arm, Metric("refusal", "bool", "lower", smallest_effect=1), gain, cut)
    assert other.verdict != "cut off"  # of what is not a length


def test_the_verdict_follows_the_direction_of_the_metric() -> None:
    rows = [Row(i, 0) for i in range(40)]
    scores: dict[str, list[float | None]] = {
        "control": [float(i) for i in range(40)],
        "more": [i + 2.0 + i % 2 for i in range(40)],
    }
    gain = compared(scores, rows, "control", 0, 0.95)["more"].difference
    assert verdict_of("more", Metric("x", "number", "higher"), gain, WHOLE).verdict == "better"
    assert verdict_of("more", Metric("x", "number", "lower"), gain, WHOLE).verdict == "worse"
    scores["more"][3] = None  # a prompt without a score in both arms is left out
    found = compared(scores, rows, "control", 0, 0.95)["more"]
    assert (found.missing, found.difference.items if found.difference else 0) == (1, 39)
