"""The record of a merge (the recipe and the digests of all inputs and outputs), and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merges.inputs.sources import Source
from merges.outputs.companions import in_markdown
from merges.recipes.plan import VERSION, Plan
from merges.recipes.recipe import statistics_files
from vectors import references
from vectors.storage.runs import RunRecord, environment
from vectors.weights import file_digest


def inputs(plan: Plan) -> list[dict[str, Any]]:
    """The entries of all inputs for the record, the base last, with the SHA-256 of each file."""
    entries = [_input(part.name, source) for part, source in zip(plan.recipe.parts, plan.sources, strict=True)]
    for part, entry in zip(plan.recipe.parts, entries, strict=True):
        entry["files"] |= {name: file_digest(path) for name, path in statistics_files(plan.recipe, part).items()}
    return [*entries, *([_input("base", plan.base)] if plan.base is not None else [])]


def states(plan: Plan) -> dict[str, list[int]]:
    """Size in bytes, inode and modification time (ns) of every input file by path, to detect a change."""
    files = [path for source in [*plan.sources, *([plan.base] if plan.base else [])] for path in source.files]
    files += [path for part in plan.recipe.parts for path in statistics_files(plan.recipe, part).values()]
    states_by_path = {}
    for path in files:
        status = path.stat()
        states_by_path[str(path)] = [status.st_size, status.st_ino, status.st_mtime_ns]
    return states_by_path


def _input(name: str, source: Source) -> dict[str, Any]:
    if source.vector is not None:
        source.vector.verify()  # Detects corruption of the file while the merge runs.
    entry: dict[str, Any] = {
        "name": name,
        "kind": source.kind,
        "identity": source.identity,
        "files": {path.name: file_digest(path) for path in source.files},
    }
    if source.model is not None and source.model.name:
        entry["model"] = source.model.name
        if source.model.revision:
            entry["revision"] = source.model.revision
    return entry


def record(
    plan: Plan, input_entries: list[dict[str, Any]], outputs: dict[str, str], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """The record as a flat mapping: enough to compute the merge again and to compare every byte.

    `input_entries` are those of `inputs`, `outputs` the digests of the written files by name, `left_out` the reasons of
    the base's files that are not in the output, by name.
    """
    return {
        "schema": 1,
        "arithmetic": VERSION,
        "plan": plan.digest,
        "recipe": plan.recipe.value(),
        "inputs": input_entries,
        "outputs": outputs,
        "shards": [[job.name for job in shard] for shard in plan.shards],
        "left_out": dict(left_out),
    }


def run_record(plan: Plan, written: Mapping[str, Any]) -> RunRecord:
    """The flat mapping of `record` in the form that all commands write."""
    details = {key: written[key] for key in ("arithmetic", "plan", "shards", "left_out")}
    return RunRecord(
        "merge", plan.recipe.method, config=written["recipe"], inputs=written["inputs"], outputs=written["outputs"],
        details=details, environment=environment("steer-workbench", "numpy", "numba"),
    )  # fmt: skip


def flat_record(value: Mapping[str, Any]) -> dict[str, Any]:
    """The flat mapping of `record` again, from the JSON value of a run record.

    Earlier versions wrote the flat mapping itself, which is returned as it is. Raises ValueError for an invalid record.
    """
    if "command" not in value:
        return dict(value)
    run = RunRecord.of(value)
    return {
        **run.details, "schema": value["schema"], "recipe": run.config, "inputs": run.inputs, "outputs": run.outputs
    }  # fmt: skip


def _display_name(entry: dict[str, Any]) -> str:
    """The name of an input, with its hub id in brackets where it has one."""
    return entry["name"] + (f" ({entry['model']})" if entry.get("model") else "")


def text(plan: Plan, written: dict[str, Any], beside: Sequence[str] = ()) -> str:
    """The model card as Markdown: front matter for the hub, the recipe, and all digests.

    `beside` are its lines about the files beside the weights.
    """
    import yaml

    recipe = plan.recipe
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "steer"]}
    licences = {
        references.licence(s.model) for s in [plan.main, *plan.sources] if s is not None and s.model is not None
    }
    if len(licences) == 1 and None not in licences:
        front["license"] = licences.pop()
    base_models = [entry["model"] for entry in written["inputs"] if entry.get("model", "").count("/") == 1]
    if base_models:
        front["base_model"] = sorted(set(base_models))
        front["base_model_relation"] = "merge"
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", "# A merged model", ""]
    lines.append(f"Made by `steer merge` with the method `{recipe.method}` from {len(recipe.parts)} input(s).")
    lines += ["", "```yaml", yaml.safe_dump(recipe.value(), sort_keys=False, allow_unicode=True).strip(), "```", ""]
    lines += ["| input | kind | file | digest |", "|---|---|---|---|"]
    lines += [
        f"| {_display_name(entry)} | {entry['kind']} | {file} | `{digest}` |"
        for entry in written["inputs"]
        for file, digest in sorted(entry["files"].items())
    ]
    origins = [part.name for part, source in zip(recipe.parts, plan.sources, strict=True) if source is plan.main]
    lines += ["", f"The files beside the weights are those of {origins[0] if origins else 'the base'}."]
    lines += ["", "| output | digest |", "|---|---|"]
    lines += [f"| {in_markdown(file)} | `{digest}` |" for file, digest in sorted(written["outputs"].items())]
    lines += [
        "",
        *beside,
        f"Plan `{written['plan']}`. `steer merge --verify` on this folder computes it again and compares every file.",
        "",
    ]
    return "\n".join(lines)
