"""The page that all reports share: self-contained HTML with tables."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child,th.text,td.text{text-align:left}"
    "code{font-size:.9em;overflow-wrap:anywhere}svg{max-width:100%;height:auto}"
    ".note{color:#666;font-size:.9em}"
    ".texts{table-layout:fixed;width:100%}.texts th,.texts td{text-align:left;vertical-align:top;font-size:.9em;"
    "white-space:pre-wrap;overflow-wrap:anywhere}.texts .prompt{font-weight:600;border-bottom:0;padding-top:1rem}"
)


def table(header: Sequence[str], body: Sequence[Sequence[str]], texts: Collection[str] = ()) -> str:
    """A table of figures as HTML; the first column holds names, and the columns `texts` what is read from the left."""
    kinds = [" class='text'" if name in texts else "" for name in header]
    heads = "".join(f"<th{kind}>{html.escape(cell)}</th>" for cell, kind in zip(header, kinds, strict=True))
    rows = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in body
    )
    return f"<table><tr>{heads}</tr>{rows}</table>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values as HTML, one per row, for what is text rather than a figure."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='text-align:left'><code>{html.escape(str(value))}</code></td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def notes(lines: Sequence[str]) -> str:
    """Explanations in small print as HTML."""
    return f"<ul class='note'>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def examples_of(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Answers by name as the entry `examples` of a report: for each prompt the answer of each name."""
    return [
        {"prompt": prompt, "answers": {name: texts[index] for name, texts in answers.items()}}
        for index, prompt in enumerate(prompts)
    ]


def example_answers(report: Mapping[str, Any]) -> str:
    """The entry `examples` of a report as HTML, under a heading; nothing where there is none."""
    listed = [(each["prompt"], each["answers"]) for each in report.get("examples", ())]
    return f"<h2>Example answers</h2>{side_by_side(listed)}" if listed else ""


def side_by_side(examples: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Texts that answer the same prompts, as HTML: a row for each prompt, a column for each name."""
    names = list(dict.fromkeys(name for _, answers in examples for name in answers))
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td colspan='{len(names)}' class='prompt'>{html.escape(prompt)}</td></tr><tr>"
        + "".join(f"<td>{html.escape(answers.get(name, ''))}</td>" for name in names)
        + "</tr>"
        for prompt, answers in examples
    )
    return f"<table class='texts'><tr>{heads}</tr>{rows}</table>"


def page(title: str, body: str, record: str) -> str:
    """A whole page that needs nothing from elsewhere; `record` names the file with everything in numbers."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}"
        f"<p class='note'>Everything in numbers: {html.escape(record)}.</p></html>\n"
    )


def number(value: float | None, form: str = ".3f") -> str:
    """The number in this format; a dash for None."""
    return "-" if value is None else format(value, form)


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """Both bounds in this format; a dash where one is missing or infinite, as with a single item."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "-"
    return f"{format(low, form)} to {format(high, form)}"
