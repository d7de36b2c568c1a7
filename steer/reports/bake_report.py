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
    "loss": ("loss", "nats per token, on the examples that were held out"),
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


PROVED = {"max_logit": "max |delta logit|", "kl_mean": "mean KL (nats)", "kl_max": "greatest KL"}


def proof_rows(proof: Mapping[str, Any]) -> list[list[str]]:
    """The comparisons of a fold's proof, a row each, under the columns PROVED."""
    compared = {f"folded against {proof['reference']}": proof["transformers"]}
    if "composition" in proof:
        compared["folded against the composition as served"] = proof["composition"]
    compared["the unsteered model against it"] = proof["base"]
    return [[name, *(f"{figures[key]:.3g}" for key in PROVED)] for name, figures in compared.items()]


def told_by_vllm(proof: Mapping[str, Any]) -> str:
    """What came of the comparison in vLLM."""
    vllm = proof["vllm"]
    return vllm.get("skipped") or f"log-probabilities within {vllm['max_log_probability']:.2g}"


def proof_page(report: Mapping[str, Any]) -> str:
    """The report of a fold as one page."""
    proof = report["proof"]
    facts = {
        **report["via"],
        "verdict": f"{proof['verdict']}, on {proof['prompts']} held-out prompts ({proof['tokens']} tokens)",
        "vLLM": told_by_vllm(proof),
        "base": report["base"]["digest"],
        **{f"vector {name}": digest for name, digest in report["vectors"].items()},
        **report["outputs"],
    }
    table = _table(["", *PROVED.values()], proof_rows(proof))
    return _framed(f"fold: {report['composition']}", table + _facts(facts))


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{heads}</tr>{cells}</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(key)}</td><td style='text-align:left'><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in facts.items()
    )
    return f"<table>{lines}</table>"


def _framed(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Bake</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{body}<p class='note'>Everything in numbers: report.json.</p></html>\n"
    )


def page(report: Mapping[str, Any], curve: str) -> str:
    """The report as one page, which needs nothing from elsewhere."""
    seen = {key for figures in report["models"].values() for key in figures}
    notes = "".join(f"<li>{name}: {note}</li>" for key, (name, note) in COLUMNS.items() if key in seen)
    facts = {
        "behaviour": report["behaviour"],
        "dose": ", ".join(f"{key} {value:.3f}" for key, value in report["dose"].items()) or "-",
        "retention": f"{report['retention']:.4f}",
        "samples": json.dumps(report["samples"]),
        "training": json.dumps(report["settings"], sort_keys=True),
    }
    if "retention_without_mix" in report:
        facts["retention without general data"] = f"{report['retention_without_mix']:.4f}"
    table = f"{_table(*rows(report['models']))}<ul class='note'>{notes}</ul>"
    return _framed(f"{report['mode']}: {report['behaviour']}", f"{table}{curve}{_facts(facts)}")


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
