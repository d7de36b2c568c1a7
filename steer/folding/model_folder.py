"""The files of a baked model's folder: weights, configuration, report and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merges.inputs.sources import Source
from merges.outputs import shards
from merges.outputs.companions import Companions, Content, card_lines, companions, in_markdown, write_all
from merges.recipes import layout
from steer.folding.pending import PendingModel
from steer.reports import fold as fold_report
from vectors import references
from vectors.events import Event, OnEvent, counter, ignore
from vectors.storage.files import write_atomically
from vectors.storage.runs import RECORD, record_of


def size_of(pending: PendingModel) -> int:
    """Bytes that the weights take."""
    return sum(layout.size(job) for job in pending.jobs.values())


def write_model(pending: PendingModel, source: Source, folder: Path, *, on_event: OnEvent = ignore) -> dict[str, str]:
    """Write weights, configuration and tokenizer files; returns the digest of each file."""
    companion_files = beside_weights(source, on_event=on_event)
    jobs = [pending.jobs[name] for name in sorted(pending.jobs)]
    cut, done = layout.cut(jobs), 0
    digests, report, total = {}, counter(on_event, "writing", "bytes"), sum(map(shards.file_size, cut))
    for name, shard in zip(shards.names(len(cut)), cut, strict=True):
        digests[name] = shards.write(
            folder / name,
            shards.pieces(shard, pending.pool),
            lambda written, before=done: report(before + written, total),  # type: ignore[misc]
        )
        done += shards.file_size(shard)
    files: dict[str, Content] = dict(companion_files.files)
    if dict(pending.config) != source.config:
        files["config.json"] = (json.dumps(pending.config, indent=2, sort_keys=True) + "\n").encode()
    if len(cut) > 1:
        files["model.safetensors.index.json"] = shards.index(cut)
    return digests | write_all(files, folder)


def beside_weights(source: Source, *, on_event: OnEvent = ignore) -> Companions:
    """The files beside a model's weights that are copied, and those left out; `on_event` receives the notes on them.

    Raises ModelError for a configuration or tokenizer that can't be copied.
    """
    companion_files = companions(source.path, source.files)
    for note in companion_files.notes():
        on_event(Event("writing", message=note))
    return companion_files


def write_report(folder: Path, report: Mapping[str, Any], source: Source, summary: str) -> None:
    """Write run.json, report.html and the model card."""
    record_of("bake", report, "steer-workbench", "torch", "transformers").write(folder)
    write_atomically(folder / "report.html", fold_report.html(report, RECORD).encode())
    write_card(folder, report, source, summary)


def write_card(folder: Path, report: Mapping[str, Any], source: Source, summary: str) -> None:
    """Write the model card: front matter for the hub, what was baked, and the digests of the files."""
    import yaml

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["steer"]}
    if source.model is not None:
        licence = references.licence(source.model)
        if licence:
            front["license"] = licence
        if source.model.name and source.model.name.count("/") == 1:
            front["base_model"] = source.model.name
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", "# A baked model", "", summary, ""]
    lines += [f"Everything that was measured stands in {RECORD}.", "", "| file | digest |", "|---|---|"]
    lines += [f"| {in_markdown(name)} | `{digest}` |" for name, digest in sorted(report["outputs"].items())]
    if report.get("as", "model") == "model":
        lines += ["", *card_lines(beside_weights(source))]
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())
