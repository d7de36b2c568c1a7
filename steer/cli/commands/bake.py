"""`steer bake`: a behaviour into the weights."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from steer.cli import options, output
from vectors.errors import UsageError

FOLD, TEACHER, DATA = "fold", "distil", "train"
# What belongs to some of the modes: an option that is typed for another one is an error, not a word unheard.
ONLY = {
    "via": (FOLD,), "skip_vllm": (FOLD,), "prompts": (FOLD, TEACHER), "tokens": (TEACHER,), "temperature": (TEACHER,),
    **dict.fromkeys(
        ("mix", "compare_mix", "pos", "neg", "steps", "batch", "accumulate", "lr", "optimiser", "given_options",
         "weight_decay", "warmup", "schedule", "preset", "lora_rank", "lora_alpha", "lora_targets", "full", "context",
         "evaluate_every", "patience", "checkpointing", "fsdp", "report_to", "seed", "dtype"), (TEACHER, DATA),
    ),
}  # fmt: skip


@options.command(
    summary="A behaviour into the weights, by algebra or by training.",
    examples="""
    steer bake 1.5*warm --mode fold -o warm-model/
    steer bake "2*warm@response" -o warm-model/ --pos warm.jsonl --neg cold.jsonl
    steer bake --teacher-prompt "You answer as a pirate." -o pirate.safetensors --as vector
    steer bake --mode train --data warm.jsonl --against cold.jsonl -o warmth.safetensors --as vector
    """,
)
@click.argument("composition", required=False)
@click.option("--model", default="smollm2", help="A folder, a hub id (org/name@revision), or the bundled smollm2.")
@click.option("-o", "--out", type=options.File, required=True, help="The folder to make; a file with --as vector.")
@click.option("--mode", type=click.Choice(["auto", "fold", "distil", "train"]), default="auto", help="How.")
@click.option("--as", "as_", type=click.Choice(["model", "lora", "vector"]), default="model", help="What to write.")
@click.option("--via", default="auto", help="Fold: auto, bias, llama or layer.")
@click.option("--skip-vllm", is_flag=True, help="Fold: prove in transformers alone; the report says so.")
@click.option("--prompts", type=options.File, help="Prompts, one a line: of the proof, or to distil on.")
@click.option("--teacher-prompt", help="Distil what the model does when it is told this.")
@click.option("--data", type=options.File, help="Train: texts to imitate.")
@click.option("--against", type=options.File, help="Train: texts of the opposite; the difference is kept.")
@click.option("--pairs", type=options.File, help="Train: pairs to prefer (DPO).")
@click.option("--mix", help="General data: FILE:SHARE, or a share of the model's own texts.  [default: 0.25]")
@click.option("--compare-mix", is_flag=True, help="Train once more without general data, and report its retention.")
@click.option("--pos", type=options.File, help="Held-out examples that show the trait, for the report.")
@click.option("--neg", type=options.File, help="Held-out examples that show its opposite.")
@click.option("--steps", default=200, help="Steps of the optimiser.")
@click.option("--batch", default=8, help="Samples of a step, shared by all processes.")
@click.option("--accumulate", default=1, help="Batches of a step.")
@click.option("--lr", default="3e-4", help="The learning rate, or auto to try a short grid.")
@click.option("--optimiser", default="adamw", help="adamw, apollo, apollo_mini or muon.")
@click.option("--set", "given_options", multiple=True, metavar="NAME=VALUE", help="An option of the optimiser.")
@click.option("--weight-decay", default=0.0, help="Decoupled.")
@click.option("--warmup", default=0.1, help="The share of the steps in which the learning rate rises.")
@click.option("--schedule", default="cosine", help="cosine, linear, constant and others.")
@click.option("--preset", type=click.Choice(["default", "attention"]), default="default", help="Of the adapter.")
@click.option("--lora-rank", type=int, help="Rank of the adapter.  [default: 16; attention: 32]")
@click.option("--lora-alpha", type=int, help="Its alpha.  [default: 32; attention: 64]")
@click.option("--lora-targets", help="Linear modules, such as q_proj,v_proj.  [default: all]")
@click.option("--full", is_flag=True, help="Train all weights, without an adapter.")
@click.option("--context", type=click.Choice(["full", "frozen"]), default="full", help="frozen: prompts stay fixed.")
@click.option("--tokens", default=48, help="Distil: the longest completion.")
@click.option("--temperature", default=1.0, help="Distil: of the samples.")
@click.option(
    "--evaluate-every",
    default=0,
    show_default=False,
    help="Steps between looks.  [default: a sixth of all, at most 50]",
)
@click.option("--patience", default=5, help="Looks without progress, after which it stops.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again in the backward pass, to save memory.")
@click.option("--fsdp", is_flag=True, help="Under torchrun: cut weights, gradients and state over the processes.")
@click.option("--report-to", default="none", help="none, tensorboard, wandb or trackio.")
@options.bindings
@options.any_base
@options.devices
@click.option("--threads", type=click.IntRange(1), help="For writing.  [default: one for each core]")
@options.seed
def command(composition: str | None, model: str, out: Path, mode: str, **given: Any) -> None:
    """Bake a behaviour into weights: folded exactly where algebra allows it, trained in where not.

    A COMPOSITION of vectors is folded (constants become biases, ablations orthogonal matrices) and proved equal, in
    transformers and in vLLM; or it is distilled, the steered model being the teacher. --mode train learns from --data
    or --pairs. A killed run goes on when the same command is typed again.
    """
    from steer.folding import choice, fold

    if mode == "auto":
        mode = "train" if given["data"] or given["pairs"] else "distil" if composition is None else ""
    _check_inputs(composition, mode, given)
    output.say_preparing(model)
    if not mode:
        assert composition is not None
        mode, why = choice.choose(composition, model, given["vectors"], given["via"])
        output.say(f"mode {mode}: {why}")
        unused = _misplaced(mode)
        if unused:
            output.say(f"not used by mode {mode}: {', '.join(unused)}")
    if mode == "fold":
        assert composition is not None
        if given["as_"] != "model":
            raise UsageError(f"a fold adds tensors that no {given['as_']} holds", "--as model, or --mode distil")
        from probes.data.reading import read_prompts

        with output.out.progress() as on_event:
            report = fold.fold(
                fold.FoldRequest(
                    composition, model, out, vectors=given["vectors"], via=given["via"], any_base=given["any_base"],
                    prompts=read_prompts(given["prompts"])[0] if given["prompts"] else None, device=given["device"],
                    vllm=False if given["skip_vllm"] else None, threads=given["threads"],
                ),
                on_event=on_event,
            )  # fmt: skip
    else:
        from steer.training import command as trained

        with contextlib.redirect_stdout(sys.stderr):  # trackers print, and stdout is the report's
            report = trained.run(composition, model, out, mode, given, tell=_tell)
        if not report:  # this process has trained for another one, which reports
            return
    human = _print_fold if mode == "fold" else _print_trained
    output.out.result({"output": str(out), **report}, lambda: human(report, out))


def _check_inputs(composition: str | None, mode: str, given: dict[str, Any]) -> None:
    """What is named must fit the mode; all misfits at once. Raises UsageError."""
    problems = []
    train = [name for name in ("data", "pairs", "against") if given[name] is not None]
    if mode == "train":
        if bool(given["data"]) == bool(given["pairs"]):
            problems.append("--mode train learns from --data or from --pairs, one of them")
        if composition is not None or given["teacher_prompt"]:
            problems.append("--mode train has no teacher: drop the composition and --teacher-prompt")
        if given["against"] and not given["data"]:
            problems.append("--against is the opposite of --data, which is missing")
    elif train:
        problems.append(f"--{' and --'.join(train)} belong to --mode train")
    elif composition is None and (mode == "fold" or given["teacher_prompt"] is None):
        problems.append(
            "there is nothing to bake: no composition" + ("" if mode == "fold" else ", no --teacher-prompt")
        )
    elif composition is not None and given["teacher_prompt"] is not None:
        problems.append("a teacher is a composition or a --teacher-prompt, not both")
    problems += [f"{flag} is of no use to --mode {mode}" for flag in (_misplaced(mode) if mode else [])]
    if bool(given["pos"]) != bool(given["neg"]):
        problems.append("--pos and --neg are measured together: give both")
    if problems:
        raise UsageError(problems, "see steer bake --help")


def _misplaced(mode: str) -> list[str]:
    """The options that were typed and that this mode does not know."""
    context = click.get_current_context()
    flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    typed = [name for name in ONLY if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [flags[name] for name in typed if mode not in ONLY[name]]


def _stage(what: str) -> None:
    output.say(f"{what} …")


def _tell(entry: dict[str, Any]) -> None:
    """Stages always; steps on a terminal; and how it stands whenever what was held out was looked at."""
    if "stage" in entry:
        first = not entry.get("done")
        if first or sys.stderr.isatty():
            count = "" if first else f" {entry['done']}/{entry['total']}"
            output.say(f"{entry['stage']}{count} …")
        return
    held = entry.get("eval_behaviour_loss")
    general = entry.get("eval_general_loss")
    if held is None and general is None and not ("loss" in entry and sys.stderr.isatty()):
        return
    parts = [f"step {int(entry['step'])}/{entry['steps']}"]
    parts += [f"loss {entry['loss']:.4f}"] if "loss" in entry else []
    parts += [f"held out {held:.4f}"] if held is not None else []
    parts += [f"trait {entry['trait']:.2f}"] if "trait" in entry else []
    parts += [f"KL to the base {general:.4f}"] if general is not None else []
    parts += [f"{entry['left']:.0f} s left"] if entry["left"] < 1e6 else []
    output.say("  ".join(parts))


def _print_fold(report: dict[str, Any], out: Path) -> None:
    from steer.reports import fold as fold_report

    proof = report["proof"]
    for part, how in report["via"].items():
        output.out.line(f"{part}: {how}")
    output.out.line()
    output.out.table(["", *fold_report.COLUMNS.values()], fold_report.rows(proof), left=1)
    output.out.line(
        f"\nvLLM: {fold_report.vllm_result(proof)}\nverdict: {proof['verdict']}, on {proof['prompts']} held-out prompts"
    )
    output.out.line(f"wrote {out}")
    output.say(f"\n{report['seconds']['writing']:.1f} s to write, {report['seconds']['all']:.1f} s with the proof")


def _print_trained(report: dict[str, Any], out: Path) -> None:
    if "models" in report:
        from steer.reports.training import rows

        header, body = rows(report["models"])
        output.out.table(header, body, left=1)
        dose = ", ".join(f"{key} {value:.2f}" for key, value in report["dose"].items())
        output.out.line(f"\ndose      {dose}  (1 is the teacher)" if dose else "")
        without = report.get("retention_without_mix")
        beside = f"; without general data {without:.3f}" if without is not None else ""
        output.out.line(f"retention {report['retention']:.3f}{beside}")
    for name, digest in report["outputs"].items():
        if name.endswith(".safetensors"):
            output.out.line(f"{name}  {digest}")
    output.out.line(f"wrote {out}")
