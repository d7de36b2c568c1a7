"""What a bake says of itself: report.json for programs, report.html for people, curves as SVG where matplotlib is."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vectors.files import write_atomically

COLUMNS = {
    "margin": ("trait margin", "nats per token: positive less negative examples, held out"),
    "kl_teacher": ("KL to the teacher", "nats per token, on the teacher's held-out responses"),
    "kl_neutral": ("KL to the base", "nats per token, on neutral text"),
    "perplexity_neutral": ("perplexity", "on neutral text that the base wrote"),
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}"
    "code{font-size:.9em;overflow-wrap:anywhere}svg{max-width:100%;height:auto}"
    ".note{color:#666;font-size:.9em}"
)


def rows(models: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """The comparison as a table: a header, and a row for each model."""
    keys = [key for key in COLUMNS if any(key in figures for figures in models.values())]
    header = ["", *(COLUMNS[key][0] for key in keys)]
    return header, [
        [name, *(f"{figures[key]:.4f}" if key in figures else "-" for key in keys)] for name, figures in models.items()
    ]


def page(report: Mapping[str, Any], curve: str) -> str:
    """The report as one page, which needs nothing from elsewhere."""
    header, body = rows(report["models"])
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in body)
    heads = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    notes = "".join(f"<li>{name}: {note}</li>" for name, note in COLUMNS.values())
    facts = {
        "behaviour": report["behaviour"],
        "dose": ", ".join(f"{key} {value:.3f}" for key, value in report["dose"].items()) or "-",
        "retention": f"{report['retention']:.4f}",
        "samples": json.dumps(report["samples"]),
        "training": json.dumps(report["settings"], sort_keys=True),
    }
    if "retention_without_mix" in report:
        facts["retention without general data"] = f"{report['retention_without_mix']:.4f}"
    lines = "".join(
        f"<tr><td>{key}</td><td style='text-align:left'><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in facts.items()
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Bake</title><style>{STYLE}</style>"
        f"<h1>{html.escape(report['mode'])}: {html.escape(report['behaviour'])}</h1>"
        f"<table><tr>{heads}</tr>{cells}</table><ul class='note'>{notes}</ul>{curve}<table>{lines}</table>"
        f"<p class='note'>Everything in numbers: report.json.</p></html>\n"
    )


def curves(history: Sequence[Mapping[str, float]]) -> str | None:
    """The losses by step as SVG; None where matplotlib is not installed."""
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


def write(folder: Path, report: Mapping[str, Any], history: Sequence[Mapping[str, float]], prefix: str = "") -> None:
    """Write report.json, report.html and curves.svg into a folder, under names that begin with `prefix`."""
    curve = curves(history)
    if curve is not None:
        write_atomically(folder / f"{prefix}curves.svg", curve.encode())
    inline = curve[curve.index("<svg") :] if curve else "<p class='note'>curves need the extra <code>plots</code></p>"
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{prefix}report.json", text.encode())
    write_atomically(folder / f"{prefix}report.html", page(report, inline).encode())
