"""Options derived from typed requests: what a field becomes on the command line, and what is built of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from steer.cli import options, requests
from steer.evaluation.request import Request as Evaluation
from steer.training import requests as training
from vectors.errors import SteerError, UsageError
from vectors.registry.options import option, problems_of, several


def rate_of(text: str) -> float | None:
    return None if text == "auto" else float(text)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    steps: int = option(200, help="Steps of the optimiser.", low=1, group="Training")
    rate: float | None = option(3e-4, help="The learning rate.", flag="--lr", parse=rate_of)
    share: float = option(0.5, help="A share.", low=0, high=1, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Train:
    out: Path = option(help="The folder to make.", flag=("-o", "--out"))
    numbers: Numbers = field(default_factory=Numbers)
    max_tokens: int = option(48, help="Tokens of a completion.", old=("--tokens",))
    as_: str = option("model", help="What to write.", choices=("model", "lora"))
    kind: str = option("one", help="One of {names}.", names=lambda: ["one", "two"])
    full: bool = option(False, help="Train all weights.")
    cache: bool = option(True, help="Keep what was computed.")
    prompts: tuple[str, ...] = option((), help="A prompt.", flag=("-p", "--prompt"))
    vectors: Mapping[str, Path] = option({}, help="What a name stands for.", flag="--vector", metavar="NAME=FILE")
    text: str | None = option(None, help="What to bake.", argument=True)


@dataclass(frozen=True, kw_only=True)
class Fold:
    max_tokens: int = option(48, help="Tokens of a completion.", old=("--tokens",))
    via: str = option("auto", help="The route.")


def built(*arguments: str, kind: type = Train) -> Any:
    """The request that a command line gives, or what was raised, or what click prints."""
    made: list[Any] = []

    @options.command("test", summary="A test.", examples="test")
    @requests.takes(kind)
    def command(**values: Any) -> None:
        made.append(requests.build(kind, values))

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if isinstance(result.exception, UsageError | click.UsageError):
        raise result.exception
    return (made or [result.output])[0]


def test_what_is_not_given_is_the_default_of_the_field() -> None:
    assert built("-o", "x") == Train(out=Path("x"))


def test_each_type_becomes_its_kind_of_option() -> None:
    request = built(
        "--out", "x", "--steps", "3", "--lr", "auto", "--as", "lora", "--full", "--no-cache", "-p", "a", "--prompt",
        "b", "--vector", "w=w.safetensors", "--kind", "two", "1.5*w",
    )  # fmt: skip
    assert request.numbers == Numbers(steps=3, rate=None)
    assert (request.as_, request.full, request.cache, request.prompts) == ("lora", True, False, ("a", "b"))
    assert request.vectors == {"w": Path("w.safetensors")}
    assert (request.kind, request.text) == ("two", "1.5*w")


def test_everything_out_of_range_is_one_error() -> None:
    with pytest.raises(UsageError) as caught:
        built("-o", "x", "--steps", "0", "--as", "modle", "--share", "0")
    assert caught.value.problems == (
        "--steps is 0, not at least 1",
        "--share is 0, outside (0, 1]",
        "--as is 'modle', not model or lora (did you mean model?)",
    )
    assert problems_of(Train(out=Path("x"))) == []


def test_bad_names_are_one_error() -> None:
    with pytest.raises(UsageError) as caught:
        built("-o", "x", "--vector", "w", "--vector", "a=b", "--vector", "a=c")
    assert caught.value.problems == ("--vector 'w' is not NAME=FILE", "--vector a is given twice")


def test_an_old_word_still_counts_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert built("-o", "x", "--tokens=5").max_tokens == 5
    assert built("-o", "x", "--tokens", "5").max_tokens == 5
    assert "--tokens" not in built("--help")


def test_the_help_lists_defaults_groups_and_the_registry() -> None:
    text = " ".join(built("--help").split())
    assert "Training: --steps INTEGER Steps of the optimiser. [default: 200]" in text
    assert "One of one, two. [default: one]" in text
    assert "--as model|lora What to write. [default: model]" in text
    assert "--cache / --no-cache" in text
    assert "[required]" in text


def test_several_requests_share_a_field_and_what_does_not_belong_is_named() -> None:
    misplaced: list[str] = []

    @options.command("test", summary="A test.", examples="test")
    @requests.takes(Train, Fold)
    def command(**values: Any) -> None:
        misplaced.extend(requests.not_of(Fold, (Train, Fold)))
        assert requests.build(Fold, values) == Fold(max_tokens=7, via="bias")

    assert [p.name for p in command.params].count("max_tokens") == 1
    result = CliRunner().invoke(command, ["-o", "x", "--steps", "9", "--max-tokens", "7", "--via", "bias"])
    assert result.exception is None
    assert misplaced == ["--out", "--steps"]


def test_two_requests_that_disagree_on_a_field_are_a_defect() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        via: str = option("layer", help="Another route.")

    with pytest.raises(TypeError, match=r"Other\.via differs"):
        requests.parameters(Fold, Other)


def test_a_required_option_that_is_missing_is_click_s_error() -> None:
    with pytest.raises(click.UsageError) as caught:
        built()
    assert "Missing option '-o' / '--out'" in caught.value.format_message()


def test_options_are_completed_from_choices_and_registries() -> None:
    found = {parameter.name: parameter for parameter in requests.parameters(Train)}
    context = click.Context(click.Command("test"))
    for name, start, expected in (("as_", "l", ["lora"]), ("kind", "", ["one", "two"])):
        assert [item.value for item in found[name].shell_complete(context, start)] == expected


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--lora-targets", "q_proj,v_proj"], "lora_targets", ("q_proj", "v_proj")),
        (["--lora-targets", "q_proj", "--lora-targets", "v_proj"], "lora_targets", ("q_proj", "v_proj")),
        ([], "lora_targets", None),
    ],
)
def test_modules_of_an_adapter_are_named_with_commas_or_one_by_one(words: list[str], field: str, value: Any) -> None:
    assert getattr(built(*words, kind=training.AdapterSettings), field) == value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--lr", "auto"], "lr", None),
        (["--lr", "5e-4"], "lr", 5e-4),
        (["--set", "eps=1e-9", "--set", "nesterov=true"], "options", {"eps": 1e-9, "nesterov": True}),
    ],
)
def test_options_of_training_are_read_as_they_are_typed(words: list[str], field: str, value: Any) -> None:
    assert getattr(built(*words, kind=training.TrainingSettings), field) == value


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused_with_the_other_problems(value: str) -> None:
    """No option has a use for one, whether it has a range or not."""
    with pytest.raises(UsageError) as caught:
        built("-o", "x", f"--lr={value}", "--share", value, "--steps", "0")
    for word, wanted in (("--lr", "not a finite number"), ("--share", "outside"), ("--steps", "not at least 1")):
        assert any(problem.startswith(f"{word} is") and wanted in problem for problem in caught.value.problems)
    with pytest.raises(UsageError) as caught:
        built("-o", "x", "--share", value, "--vector", "a")  # one that can't be read, and one out of range
    assert len(caught.value.problems) == 2


def test_a_field_of_several_values_takes_one_or_any_sequence_in_python() -> None:
    """`control="none"` was taken as four controls, and a list as one."""
    for given in ("none", ["none"], ("none",)):
        assert several(Evaluation, {"control": given, "seed": 3}) == {"control": ("none",), "seed": 3}
    assert several(Evaluation, {"entangled": "a.yaml", "curve": [1, 2]}) == {
        "entangled": (Path("a.yaml"),), "curve": (1, 2),
    }  # fmt: skip


def test_an_option_with_a_problem_keeps_its_default_where_problems_are_collected() -> None:
    values = {"out": Path("m"), "steps": 0, "share": 0.25, "as_": "neither"}
    errors: list[SteerError] = []
    built = requests.build(Train, values, errors)
    assert (built.out, built.numbers.steps, built.numbers.share, built.as_) == (Path("m"), 200, 0.25, "model")
    assert len(errors) == 2
    with pytest.raises(UsageError) as caught:
        requests.build(Train, values)
    assert len(caught.value.problems) == 2
