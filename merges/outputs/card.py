"""What a merge says of itself: a record with the recipe and every digest, and the model card for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merges.inputs.sources import Source
from merges.recipes.plan import VERSION, Plan
from merges.recipes.recipe import statistics_files
from vectors import references
from vectors.runs import RunRecord, environment
from vectors.weights import file_digest


def inputs(plan: Plan) -> list[dict[str, Any]]:
    """Every input, the base last, with the SHA-256 of each of its files."""
    found = [_input(part.name, source) for part, source in zip(plan.recipe.parts, plan.sources, strict=True)]
    for part, entry in zip(plan.recipe.parts, found, strict=True):
        entry["files"] |= {name: file_digest(path) for name, path in statistics_files(plan.recipe, part).items()}
    return [*found, *([_input("base", plan.base)] if plan.base is not None else [])]


def states(plan: Plan) -> dict[str, list[int]]:
    """Of every file that is read: its size, inode and time of change, which tell whether it was written to."""
    files = [path for source in [*plan.sources, *([plan.base] if plan.base else [])] for path in source.files]
    files += [path for part in plan.recipe.parts for path in statistics_files(plan.recipe, part).values()]
    found = {}
    for path in files:
        status = path.stat()
        found[str(path)] = [status.st_size, status.st_ino, status.st_mtime_ns]
    return found


def _input(name: str, source: Source) -> dict[str, Any]:
    if source.vector is not None:
        source.vector.verify()  # Bits that have flipped since it was written are found here, while the merge runs.
    found: dict[str, Any] = {
        "name": name,
        "kind": source.kind,
        "identity": source.identity,
        "files": {path.name: file_digest(path) for path in source.files},
    }
    if source.model is not None and source.model.name:
        found["model"] = source.model.name
        if source.model.revision:
            found["revision"] = source.model.revision
    return found


def record(plan: Plan, found: list[dict[str, Any]], outputs: dict[str, str]) -> dict[str, Any]:
    """What is written beside the weights: enough to make them again, and to prove that they are what they are."""
    return {
        "schema": 1,
        "arithmetic": VERSION,
        "plan": plan.digest,
        "recipe": plan.recipe.value(),
        "inputs": found,
        "outputs": outputs,
        "shards": [[job.name for job in shard] for shard in plan.shards],
    }


def run_record(plan: Plan, written: Mapping[str, Any]) -> RunRecord:
    """What `record` made, in the form that all commands share."""
    details = {key: written[key] for key in ("arithmetic", "plan", "shards")}
    return RunRecord(
        "merge", plan.recipe.method, config=written["recipe"], inputs=written["inputs"], outputs=written["outputs"],
        details=details, environment=environment("steer-workbench", "numpy", "numba"),
    )  # fmt: skip


def flat_record(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `record` made, from the value of a run record, or of an earlier version's file, which held it as it was.

    Raises ValueError for what is no run record.
    """
    if "command" not in value:
        return dict(value)
    run = RunRecord.of(value)
    return {
        **run.details, "schema": value["schema"], "recipe": run.config, "inputs": run.inputs, "outputs": run.outputs
    }  # fmt: skip


def _called(entry: dict[str, Any]) -> str:
    """The name of an input, and that of the model that it is, where it has one."""
    return entry["name"] + (f" ({entry['model']})" if entry.get("model") else "")


def text(plan: Plan, written: dict[str, Any]) -> str:
    """The model card: front matter that the hub reads, the recipe, the digests."""
    import yaml

    recipe = plan.recipe
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "steer"]}
    licences = {
        references.licence(s.model) for s in [plan.main, *plan.sources] if s is not None and s.model is not None
    }
    if len(licences) == 1 and None not in licences:
        front["license"] = licences.pop()
    named = [entry["model"] for entry in written["inputs"] if entry.get("model", "").count("/") == 1]
    if named:
        front["base_model"] = sorted(set(named))
        front["base_model_relation"] = "merge"
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", "# A merged model", ""]
    lines.append(f"Made by `steer merge` with the method `{recipe.method}` from {len(recipe.parts)} input(s).")
    lines += ["", "```yaml", yaml.safe_dump(recipe.value(), sort_keys=False, allow_unicode=True).strip(), "```", ""]
    lines += ["| input | kind | file | digest |", "|---|---|---|---|"]
    lines += [
        f"| {_called(entry)} | {entry['kind']} | {file} | `{digest}` |"
        for entry in written["inputs"]
        for file, digest in sorted(entry["files"].items())
    ]
    lines += ["", "| output | digest |", "|---|---|"]
    lines += [f"| {file} | `{digest}` |" for file, digest in sorted(written["outputs"].items())]
    lines += [
        "",
        f"Plan `{written['plan']}`. `steer merge --verify` on this folder computes it again and compares.",
        "",
    ]
    return "\n".join(lines)
