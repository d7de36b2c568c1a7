"""What commands print: data to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click


def fail(problems: Sequence[str], hint: str = "") -> None:
    """Print an error: what is wrong, and the next step."""
    for problem in problems:
        click.echo(f"error: {problem.rstrip('.')}", err=True)
    if hint:
        click.echo(f"\nhint: {hint}", err=True)


def warn(text: str) -> None:
    """Print a warning."""
    click.echo(f"warning: {text}", err=True)


def say(text: str) -> None:
    """Print what is neither data nor wrong; nothing for an empty text."""
    if text:
        click.echo(text, err=True)


def replacing(path: Path) -> str:
    """The sentence that says which file is replaced by writing to `path`; empty where there is none."""
    from vectors.files import digest_file

    return f"replaces {path}, which was {digest_file(path)}" if path.is_file() else ""


def print_json(value: Any) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows under a header, right-aligned but for the first `left` columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def side_by_side(titles: Sequence[str], texts: Sequence[str]) -> str:
    """Texts in columns under their titles, as wide as the terminal; below each other where columns would be narrow."""
    width = shutil.get_terminal_size((100, 24)).columns
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n".join(
            f"{title}\n{textwrap.indent(textwrap.fill(' '.join(text.split()), width - 4), '    ')}"
            for title, text in zip(titles, texts, strict=True)
        )
    wrapped = [
        [title, "-" * column, *textwrap.wrap(" ".join(text.split()), column)]
        for title, text in zip(titles, texts, strict=True)
    ]
    height = max(map(len, wrapped))
    lines = zip(*[lines + [""] * (height - len(lines)) for lines in wrapped], strict=True)
    return "\n".join("   ".join(cell.ljust(column) for cell in line).rstrip() for line in lines)


def say_preparing(reference: str) -> None:
    """Say that the bundled model is going to be converted, which takes a while and happens once."""
    from vectors import bundled, references

    if reference == references.DEFAULT and not bundled.folder().is_dir():
        say(f"preparing the bundled model {reference} (once, about half a minute)")


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `show(done, total)`, which draws a bar on stderr when that is a terminal, and nothing elsewhere."""
    state: dict[str, Any] = {}

    def show(done: int, total: int) -> None:
        if "bar" not in state:
            state["bar"] = click.progressbar(length=total, label=label, file=sys.stderr, hidden=not sys.stderr.isatty())
            state["bar"].__enter__()
        state["bar"].update(done - state.get("done", 0))
        state["done"] = done

    try:
        yield show
    finally:
        if "bar" in state:
            state["bar"].__exit__(None, None, None)
