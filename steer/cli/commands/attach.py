"""`steer attach`: attach an evaluation or the report of an experiment to a version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments and options of `steer attach`."""

    version: str = option(help="name, name:tag, name@alias or a digest.", argument=True)
    folder: Path = option(help="The folder that steer eval --out or steer ab report wrote.", argument=True)
    kind: str = option("evaluation", help="What it is.", choices=("evaluation", "experiment"))


@options.command(
    summary="Attach an evaluation or the report of an experiment to a version.",
    examples="""
    steer attach tone warm-eval/
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Attach results to the composition of a version, whose digest stays the same. Push and pull send them along."""
    request = requests.build(Request, values)
    from steer.store import layout, names, referrers
    from steer.store.objects.model import read_commit

    store = layout.require()
    digest = names.resolve(store, request.version)
    files = sorted(path for path in request.folder.glob("*") if path.is_file()) if request.folder.is_dir() else []
    if not any(path.name == "report.json" for path in files):
        raise UsageError(f"{request.folder} holds no report.json", "make one: steer eval … --out FOLDER")
    kind = referrers.EVALUATION if request.kind == "evaluation" else referrers.EXPERIMENT
    composition = read_commit(store, digest).composition
    attached = referrers.attach(store, composition, kind, {path.name: path.read_bytes() for path in files})
    sentence = f"attached {len(files)} files to {names.short(digest)}"
    out.result({"version": digest, "attached": attached, "files": [p.name for p in files]}, lambda: out.line(sentence))
