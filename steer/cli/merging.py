"""Shared by the merging commands: lists of numbers in options, and printing of plans, merges and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli.output import out
from vectors.errors import UsageError, shortened

if TYPE_CHECKING:
    from merges.recipes.plan import Plan


def numbers(text: str | None, flag: str, count: int) -> list[float] | None:
    """Parse `1,0.5` to one number for each of `count` inputs; a single number counts for all. Raises UsageError."""
    from vectors.documents.numbers import number

    if text is None:
        return None
    values = [number(part) for part in text.split(",")]
    if not all(isinstance(value, int | float) for value in values):
        raise UsageError(f"{flag} is {text!r}, not numbers separated by commas", f"write {flag} 1,0.5")
    result = [float(value) for value in values]
    if len(result) == 1:
        result *= count
    if len(result) != count:
        raise UsageError(
            f"{flag} has {len(result)} numbers; there are {count} inputs", "give one for each input, or one for all"
        )
    return result


def print_plan(plan: Plan) -> None:
    """Print the plan of a merge, before anything is written."""
    data = {
        "recipe": plan.recipe.value(),
        "plan": plan.digest,
        "tensors": len(plan.jobs),
        "bytes": plan.bytes,
        "shards": [{"tensors": len(shard)} for shard in plan.shards],
        "memory": plan.memory,
        "threads": plan.pool.threads,
        "notes": plan.notes,
        "inputs": [
            {"name": p.name, "identity": s.identity} for p, s in zip(plan.recipe.parts, plan.sources, strict=True)
        ],
    }
    out.result(data, lambda: _print_plan(plan))


def _print_plan(plan: Plan) -> None:
    named = [(part.name, source) for part, source in zip(plan.recipe.parts, plan.sources, strict=True)]
    named += [("(base)", plan.base)] if plan.base is not None else []
    rows = [
        [name, source.kind, f"{sum(f.stat().st_size for f in source.files) / 1e9:.2f} GB", source.identity[:19]]
        for name, source in named
    ]
    out.table(["input", "kind", "size", "identity"], rows, left=2)
    threads = plan.pool.threads
    out.line(f"\nmethod    {plan.recipe.method}, scope {plan.recipe.scope}, as {plan.recipe.as_}")
    out.line(f"result    {len(plan.jobs)} tensors, {plan.bytes / 1e9:.2f} GB in {len(plan.shards)} file(s)")
    out.line(f"memory    at most {plan.memory / 2**20:.0f} MiB beyond mapped files, with {threads} thread(s)")
    out.line(f"plan      {plan.digest}")
    for note in plan.notes:
        out.say(note)


def print_merge(folder: Path, record: dict[str, Any]) -> None:
    """Print the outputs of a finished merge."""

    def human() -> None:
        for name, digest in record["outputs"].items():
            if name.endswith(".safetensors"):
                out.line(f"{name}  {digest}")
        out.line(f"wrote {folder}  plan {record['plan']}")
        _print_summary(record.get("summary"))

    out.result({"output": str(folder), **record}, human)


def _print_summary(summary: dict[str, Any] | None) -> None:
    """Print each input's part in the result, where there is a base to compare with."""
    if summary is None:
        return
    rows = [
        [
            entry["name"], f"{entry['norm']:.4g}", f"{entry['kept']:.0%}", f"{entry['sign_conflicts']:.1%}",
            f"{entry['cosine']:.3f}",
        ]
        for entry in summary["inputs"]
    ]  # fmt: skip
    out.line("")
    out.table(["input", "norm of its delta", "kept", "sign conflicts", "cosine to the result"], rows, left=1)
    if summary["sampled"] < 1:
        out.line(f"(estimated from {summary['sampled']:.2%} of the elements)")


def print_adapter(folder: Path, report: dict[str, Any]) -> None:
    """Print the rank and the error of a delta that was written as a LoRA adapter."""

    def human() -> None:
        out.line(f"wrote {folder}, rank {report['rank']}, relative error {report['relative_error']:.3g}")
        if report["left_out"]:
            out.warn(
                f"the adapter lacks the changes of {len(report['left_out'])} parameters, which LoRA of linear layers "
                f"can't hold: {shortened(report['left_out'])}"
            )

    out.result({"adapter": str(folder), **report}, human)
