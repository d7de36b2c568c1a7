"""The report of a training bake: the table of models, the curves of the losses, and both on one page."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.reports import page
from vectors.storage.files import write_atomically
from vectors.storage.runs import record_of, record_path

COLUMNS = {
    "margin": ("trait margin", "nats per token: positive less negative examples, none of them trained on"),
    "kl_teacher": ("KL to the teacher", "nats per token, on the teacher's held-out responses"),
    "loss": ("loss", "nats per token, on the examples that were held out"),
    "kl_neutral": ("KL to the base", "nats per token, on neutral text"),
    "perplexity_neutral": ("perplexity", "on neutral text that the base wrote"),
}


def rows(
    models: Mapping[str, Mapping[str, float]], counts: Mapping[str, int] | None = None
) -> tuple[list[str], list[list[str]]]:
    """The comparison as a table: a header, with the number of items that a figure is from, and a row for each model."""
    keys = [key for key in COLUMNS if any(key in figures for figures in models.values())]
    header = ["", *(f"{COLUMNS[key][0]}{_items(key, counts or {})}" for key in keys)]
    return header, [
        [name, *(f"{figures[key]:.4f}" if key in figures else "-" for key in keys)] for name, figures in models.items()
    ]


def _items(key: str, counts: Mapping[str, int]) -> str:
    """The number of items behind the figures of a column, such as ` (n=6)`; empty where it is not recorded."""
    if key == "margin" and "positive" in counts:
        return f" (n={counts['positive']}+{counts['negative']})"
    kind = "neutral" if key.endswith("neutral") else "held_out"
    return f" (n={counts[kind]})" if kind in counts else ""


def html(report: Mapping[str, Any], curve: str, record: str) -> str:
    """The report as one self-contained page; `record` names the file with everything in numbers."""
    measured = {key for figures in report["models"].values() for key in figures}
    facts = {
        "behaviour": report["behaviour"],
        "dose": ", ".join(f"{key} {value:.3f}" for key, value in report["dose"].items()) or "-",
        "retention": f"{report['retention']:.4f}",
        "samples": json.dumps(report["samples"]),
        "training": json.dumps(report["settings"], sort_keys=True),
    }
    if "retention_without_mix" in report:
        facts["retention without replay data"] = f"{report['retention_without_mix']:.4f}"
    notes = page.notes([f"{name}: {note}" for key, (name, note) in COLUMNS.items() if key in measured])
    table, examples = page.table(*rows(report["models"], report.get("measured_on"))), page.example_answers(report)
    body = f"{table}{notes}{curve}{examples}{page.facts(facts)}"
    return page.page(f"{report['mode']}: {report['behaviour']}", body, record)


def curves(history: Sequence[Mapping[str, float]]) -> str | None:
    """The losses (nats) by step as SVG; None if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in [
        ("loss", "training loss", "-"),
        ("eval_behaviour_loss", "held out: behaviour", "o-"),
        ("eval_general_loss", "held out: general", "s--"),
    ]:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.set(xlabel="step", ylabel="nats", ylim=(0, None))
    axes.legend(frameon=False)
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "steer"}):  # so that the same curves are the same bytes
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def write(output: Path, report: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> None:
    """Write run.json, report.html and curves.svg into an output folder, or beside an output file as NAME.run.json."""
    folder, prefix = (output, "") if output.is_dir() else (output.parent, f"{output.stem}.")
    curve = curves(history)
    if curve is not None:
        write_atomically(folder / f"{prefix}curves.svg", curve.encode())
    inline = curve[curve.index("<svg") :] if curve else "<p class='note'>curves need the extra <code>plots</code></p>"
    write_atomically(folder / f"{prefix}report.html", html(report, inline, record_path(output).name).encode())
    # Last: when an interrupted `--mode contrast` is resumed, a half with a record counts as finished.
    record_of("bake", report, "steer-workbench", "torch", "transformers", "peft").write(output)
