"""`steer bake`: write a behaviour into the weights of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from steer.cli import options, output, requests
from steer.cli.output import out
from steer.training.requests import (
    MODES,
    BakeRequest,
    ContrastRequest,
    FoldRequest,
    ImitateRequest,
    PreferRequest,
)
from vectors.errors import UsageError
from vectors.events import Event, OnEvent

REQUESTS: tuple[type[BakeRequest], ...] = tuple(request for mode in MODES.values() for request in mode)


def _list_options(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print the options of every optimiser, and exit."""
    if not value:
        return
    from steer.training import optimisers

    options_by_name = {name: optimiser.OPTIONS for name, optimiser in optimisers.available().items()}
    rows = [[name, *row] for name, known in options_by_name.items() for row in options.option_rows(known)]
    out.result(
        {name: options.option_values(known) for name, known in options_by_name.items()},
        lambda: out.table(["optimiser", "option", "default", "range", "meaning"], rows, 5),
    )
    context.exit()


@options.command(
    summary="Bake a behaviour into the weights, by folding or by training.",
    examples="""
    steer bake 1.5*warm --mode fold -o warm-model/
    steer bake "2*warm@response" -o warm-model/ --pos warm.jsonl --neg cold.jsonl
    steer bake --teacher-prompt "You answer as a pirate." -o pirate.safetensors --as vector
    steer bake --mode train --data warm.jsonl --against cold.jsonl -o warmth.safetensors --as vector
    """,
)
@click.option(
    "--mode", type=click.Choice(["auto", *MODES]), default="auto",
    help="How to bake: fold by algebra, distil a steered or prompted teacher, or train on examples.",
)  # fmt: skip
@click.option(
    "--list-options", is_flag=True, is_eager=True, expose_value=False, callback=_list_options,
    help="List the options of every optimiser for --set, with default, range and meaning, and exit.",
)  # fmt: skip
@requests.takes(*REQUESTS)
def command(mode: str, **values: Any) -> None:
    """Bake a behaviour into the weights: by folding where that is exact, else by training.

    A COMPOSITION of vectors is folded (additions become biases; ablations make matrices orthogonal to the direction),
    and the result is compared with the steered model, in transformers and in vLLM. Where it can't be folded, it is
    distilled, with the steered model as the teacher. --mode train learns from --data or --pairs. The same command
    resumes a killed run.
    """
    from steer.folding import choice
    from steer.training.api import bake

    if mode == "auto":
        mode = "train" if values["data"] or values["pairs"] else "distil" if values["composition"] is None else ""
    _require_inputs(mode, values)
    output.say_preparing(values["model"])
    if not mode:
        shared = requests.build(FoldRequest, values)
        assert shared.composition is not None
        mode, why = choice.choose(shared.composition, shared.model, shared.vectors, shared.via)
        out.say(f"mode {mode}: {why}")
        unused = [word for word, _ in _misplaced(MODES[mode][0])]
        if unused:
            out.say(f"not used by mode {mode}: {', '.join(unused)}")
    request = requests.build(_request_type(mode, values), values)
    # Trackers print to stdout, which is kept for the report.
    with contextlib.redirect_stdout(sys.stderr), out.progress() as on_event:
        report = bake(request, on_event=_with_evaluations(on_event))  # type: ignore[arg-type]
    if not report:  # another rank than 0: rank 0 reports
        return
    show = _print_fold if mode == "fold" else _print_trained
    out.result({"output": str(request.out), **report}, lambda: show(report, request.out))


def _request_type(mode: str, values: dict[str, Any]) -> type[BakeRequest]:
    if mode != "train":
        return MODES[mode][0]
    return PreferRequest if values["pairs"] else ContrastRequest if values["against"] else ImitateRequest


def _require_inputs(mode: str, values: dict[str, Any]) -> None:
    """Check that the inputs fit the mode. Raises UsageError with every problem."""
    problems = []
    composition, prompt = values["composition"], values["teacher_prompt"]
    if mode == "train":
        if bool(values["data"]) == bool(values["pairs"]):
            problems.append("--mode train needs either --data or --pairs")
        if composition is not None or prompt:
            problems.append("--mode train has no teacher: drop the composition and --teacher-prompt")
        if values["against"] and not values["data"]:
            problems.append("--against needs --data, the examples that it is the opposite of")
    elif composition is None and (mode == "fold" or prompt is None):
        problems.append(
            "there is nothing to bake: no composition" + ("" if mode == "fold" else ", no --teacher-prompt")
        )
    elif composition is not None and prompt is not None:
        problems.append("the teacher is a composition or a --teacher-prompt, not both")
    request = _request_type(mode, values) if mode else None
    for word, modes in _misplaced(request) if request else []:
        if word != "--teacher-prompt" or mode != "train":
            problems.append(f"{word} belongs to --mode {' and --mode '.join(modes)}, not to --mode {mode}")
    if not mode and values["against"]:
        problems.append("--against belongs to --mode train: give --data too")
    if bool(values["pos"]) != bool(values["neg"]):
        problems.append("--pos and --neg are used together: give both")
    if problems:
        raise UsageError(problems, "see steer bake --help")


def _misplaced(request: type[BakeRequest]) -> list[tuple[str, list[str]]]:
    """The options on the command line that a request has no field for, each with the modes it belongs to."""
    words = requests.not_of(request, REQUESTS)
    names = {word: name for name, word in requests.typed(click.get_current_context()).items()}
    mode = next(mode for mode, types in MODES.items() if request in types)
    misplaced = []
    for word in words:
        modes = [m for m, types in MODES.items() if any(names[word] in _names(each) for each in types)]
        if mode not in modes:
            misplaced.append((word, modes))
    return misplaced


def _names(request: type[BakeRequest]) -> set[str]:
    return {field.name for field in requests.fields_of(request)}


def _with_evaluations(on_event: OnEvent) -> OnEvent:
    """Add a line with the metrics to every event of training that has some of the evaluation set."""

    def report(event: Event) -> None:
        formats = {
            "eval_behaviour_loss": "held-out loss {:.4f}", "trait": "trait {:.2f}",
            "eval_general_loss": "KL to the base {:.4f}",
        }  # fmt: skip
        parts = [formats[name].format(event.metrics[name]) for name in formats if name in event.metrics]
        if parts:
            event = dataclasses.replace(event, message="  ".join([f"step {event.done}/{event.total}", *parts]))
        on_event(event)

    return report


def _print_fold(report: dict[str, Any], path: Path) -> None:
    from steer.reports import fold as fold_report

    proof = report["proof"]
    for part, how in report["via"].items():
        out.line(f"{part}: {how}")
    out.line()
    out.table(["", *fold_report.COLUMNS.values()], fold_report.rows(proof), left=1)
    out.line(
        f"\nvLLM: {fold_report.vllm_result(proof)}\nverdict: {proof['verdict']}, on {proof['prompts']} held-out prompts"
    )
    out.line(f"wrote {path}")
    out.say(f"\n{report['seconds']['writing']:.1f} s to write, {report['seconds']['all']:.1f} s with the proof")


def _print_trained(report: dict[str, Any], path: Path) -> None:
    from steer.reports.training import rows

    header, body = rows(report["models"])
    out.table(header, body, left=1)
    dose = ", ".join(f"{key} {value:.2f}" for key, value in report["dose"].items())
    out.line(f"\ndose      {dose}  (1 is the teacher)" if dose else "")
    without = report.get("retention_without_mix")
    beside = f"; without replay data {without:.3f}" if without is not None else ""
    out.line(f"retention {report['retention']:.3f}{beside}")
    for name, digest in report["outputs"].items():
        if name.endswith(".safetensors"):
            out.line(f"{name}  {digest}")
    out.line(f"wrote {path}")
