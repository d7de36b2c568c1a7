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
from steer.training import modes
from steer.training.modes.fold import FoldRequest
from steer.training.requests import BakeRequest
from vectors.errors import UsageError
from vectors.events import Event, OnEvent


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


def _parameters() -> list[click.Parameter]:
    """--mode, and the options of every mode."""
    available = modes.available()
    summaries = [f"{mode} ({'; '.join(module.SUMMARY for module in modules)})" for mode, modules in available.items()]
    mode = click.Option(
        ["--mode"], type=options.NamedChoice(["auto", *available]), default="auto",
        help=f"How to bake: {', '.join(summaries)}, or auto: fold where that is exact, else by training.",
    )  # fmt: skip
    return [mode, *requests.parameters(*modes.request_types())]


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
    "--list-options", is_flag=True, is_eager=True, expose_value=False, callback=_list_options,
    help="List the options of every optimiser for --set, with default, range and meaning, and exit.",
)  # fmt: skip
@requests.takes_later(_parameters)
def command(mode: str, **values: Any) -> None:
    """Bake a behaviour into the weights: by folding where that is exact, else by training.

    A COMPOSITION of vectors is folded (additions become biases; ablations make matrices orthogonal to the direction),
    and the result is compared with the steered model, in transformers and in vLLM. Where it can't be folded, it is
    distilled, with the steered model as the teacher. --mode train learns from --data or --pairs. The same command
    resumes a killed run.
    """
    from steer.folding import choice
    from steer.training import work
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
        unused = [word for word, _ in _misplaced(modes.request_type(mode, values))]
        if unused:
            out.say(f"not used by mode {mode}: {', '.join(unused)}")
    request = requests.build(modes.request_type(mode, values), values)
    if request.as_ == "vector" and not work.path_of(request.out).is_dir():  # else the run is resumed
        output.require_absent(request.out, request.force)
    # Trackers print to stdout, which is kept for the report.
    with contextlib.redirect_stdout(sys.stderr), out.progress() as on_event:
        report = bake(request, on_event=_with_evaluations(on_event))
    if not report:  # another rank than 0: rank 0 reports
        return
    show = _print_fold if mode == "fold" else _print_trained
    out.result({"output": str(request.out), **report}, lambda: show(report, request.out))


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
    elif mode in ("", "fold", "distil") and composition is None and (mode == "fold" or prompt is None):
        problems.append(
            "there is nothing to bake: no composition" + ("" if mode == "fold" else ", no --teacher-prompt")
        )
    elif composition is not None and prompt is not None:
        problems.append("the teacher is a composition or a --teacher-prompt, not both")
    request = modes.request_type(mode, values) if mode else None
    if request is not None and mode != "train" and composition is not None and "composition" not in _names(request):
        problems.append(f"a composition belongs to --mode {' and --mode '.join(_modes_of('composition'))}")
    for word, others in _misplaced(request) if request else []:
        if word != "--teacher-prompt" or mode != "train":
            problems.append(f"{word} belongs to --mode {' and --mode '.join(others)}, not to --mode {mode}")
    if not mode and values["against"]:
        problems.append("--against belongs to --mode train: give --data too")
    if bool(values["pos"]) != bool(values["neg"]):
        problems.append("--pos and --neg are used together: give both")
    if problems:
        raise UsageError(problems, "see steer bake --help")


def _misplaced(request: type[BakeRequest]) -> list[tuple[str, list[str]]]:
    """The options on the command line that a request has no field for, each with the modes it belongs to."""
    fields = {word: name for name, word in requests.typed(click.get_current_context()).items()}
    words = requests.not_of(request, modes.request_types())
    owners = {word: _modes_of(fields[word]) for word in words}
    this = next(
        mode for mode, modules in modes.available().items() if request in [module.REQUEST for module in modules]
    )
    return [(word, owners[word]) for word in words if this not in owners[word]]


def _modes_of(field: str) -> list[str]:
    """The values of --mode with a request that has this field."""
    by_mode = modes.available().items()
    return [mode for mode, modules in by_mode if any(field in _names(module.REQUEST) for module in modules)]


def _names(request: type[BakeRequest]) -> set[str]:
    return {field.name for field in requests.fields_of(request)}


def _with_evaluations(on_event: OnEvent) -> OnEvent:
    """Add a line with the metrics to every event of training that has some of the evaluation set."""

    def report(event: Event) -> None:
        formats = {
            "eval_behaviour_loss": "held-out loss {:.4f}", "held_out_samples": "(n={:.0f})", "trait": "trait {:.2f}",
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
        f"\nvLLM: {fold_report.vllm_result(proof)}\nverdict: {proof['verdict']}, on {fold_report.prompts_of(proof)}"
    )
    out.line(f"wrote {path}")
    out.say(f"\n{report['seconds']['writing']:.1f} s to write, {report['seconds']['all']:.1f} s with the proof")


def _print_trained(report: dict[str, Any], path: Path) -> None:
    from steer.reports.training import rows

    header, body = rows(report["models"], report.get("measured_on"))
    out.table(header, body, left=1)
    _print_training(report)
    dose = ", ".join(f"{key} {value:.2f}" for key, value in report["dose"].items())
    out.line(f"\ndose      {dose}  (1 is the teacher)" if dose else "")
    without = report.get("retention_without_mix")
    beside = f"; without replay data {without:.3f}" if without is not None else ""
    out.line(f"retention {report['retention']:.3f}{beside}")
    for name, digest in report["outputs"].items():
        if name.endswith(".safetensors"):
            out.line(f"{name}  {digest}")
    out.line(f"wrote {path}")


def _print_training(report: dict[str, Any]) -> None:
    """Which weights were used, and the held-out loss of each training."""
    for name, part in (report.get("reports") or {"": report}).items():
        best, held_out = part.get("best"), part["measured_on"]["held_out"]
        if not best or not held_out:
            continue
        before, after = (part["models"][model].get("loss") for model in ("base", "baked"))
        of = f" of {part['behaviour']}" if name else ""
        change = "" if before is None else f", {before:.4f} before training"
        out.line(
            f"held-out loss{of} {best['held_out_loss']:.4f} (n={held_out}){change}; "
            f"the weights are those of step {best['step']} of {part['steps']}"
        )
        if before is not None and after is not None and after > before:
            out.warn(f"the held-out loss{of} rose: train for fewer steps (--steps), or on more examples")
