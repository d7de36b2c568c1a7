"""The output of commands: data to stdout, everything else to stderr. Only this module and `progress` print.

A command ends in `out.result(data, human)`: one JSON object with --json, else what `human` prints. On a terminal, rich
draws tables and columns of text; in a pipe or a file they are plain text.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.cli.terminal import clean, clean_json
from vectors.errors import bounded, cut

if TYPE_CHECKING:
    from steer.cli.progress import Progress
    from vectors.events import OnEvent


MOST = 40  # problems that a terminal shows


class Output:
    """The output of one run; `json` and `quiet` are the options --json and --quiet."""

    def __init__(self) -> None:
        self.json = self.quiet = False
        self.active_progress: Progress | None = None

    def begin(self, *, json: bool) -> None:
        """Reset the state, since several runs can share a process."""
        self.json, self.quiet, self.active_progress = json, False, None

    def result(self, data: Mapping[str, Any], human: Callable[[], None]) -> None:
        """Print the result of a command: `data` as one JSON object with --json, else by calling `human`."""
        from vectors.storage.files import finite

        if self.json:
            click.echo(clean_json(json.dumps(finite(data), ensure_ascii=False, allow_nan=False, indent=2)))
        else:
            human()

    def line(self, text: str = "") -> None:
        """Print a line of data."""
        click.echo(clean(text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> None:
        """Print a table; the first `left` columns are aligned to the left, the others to the right."""
        if sys.stdout.isatty():
            _draw_table(header, rows, left)
        else:
            self.line(table(header, rows, left))

    def side_by_side(self, titles: Sequence[str], texts: Sequence[str]) -> None:
        """Print texts in columns under their titles."""
        if sys.stdout.isatty() and shutil.get_terminal_size().columns >= 27 * len(texts):
            _draw_texts(titles, texts)
        else:
            self.line(side_by_side(titles, texts))

    def coloured(self, tokens: Sequence[tuple[str, float, bool]], centre: float, width: float) -> None:
        """Print tokens (text, value, whether it counts) in colours of their values; in a pipe, one a line."""
        if sys.stdout.isatty():
            _draw_tokens(tokens, centre, width)
        else:
            rows = [[json.dumps(text, ensure_ascii=False), f"{value:.3f}" if counts else "-"]
                    for text, value, counts in tokens]  # fmt: skip
            self.line(table(["token", "value"], rows, left=1))

    def say(self, text: str) -> None:
        """Print a note to stderr; nothing for an empty text, or with --quiet."""
        if text and not self.quiet:
            self._note(text)

    def warn(self, text: str) -> None:
        """Print a warning to stderr; nothing with --quiet."""
        if not self.quiet:
            self._note(f"warning: {cut(text)}")

    def fail(self, problems: Sequence[str], hint: str = "") -> None:
        """Print an error: all problems, and the next step as a hint; with --json, one object to stdout."""
        problems = [problem.rstrip(".") for problem in bounded(problems, MOST)]
        hint = cut(hint)
        if self.json:
            self.result({"error": "; ".join(problems), "problems": problems, "hint": hint}, lambda: None)
            return
        for problem in problems:
            self._note(f"error: {problem}")
        if hint:
            self._note(f"\nhint: {hint}")

    @contextlib.contextmanager
    def progress(self) -> Iterator[OnEvent]:
        """A context manager that shows progress; yields the `on_event` argument for long functions."""
        from steer.cli.progress import Progress

        with Progress(quiet=self.quiet) as active:
            self.active_progress = active
            try:
                yield active
            finally:
                self.active_progress = None

    def end_stage(self) -> None:
        """Take the progress bar away until the next event: below a question it would wipe what is typed."""
        if self.active_progress is not None:
            self.active_progress.end()

    def _note(self, text: str) -> None:
        if self.active_progress is None or not self.active_progress.print(text):
            click.echo(clean(text), err=True)


out = Output()
say, warn, fail = out.say, out.warn, out.fail


def replacing(path: Path) -> str:
    """A note with the digest of the file that writing to `path` will replace; empty where there is none."""
    from vectors.storage.files import digest_file

    try:
        return f"replaces {path}, which was {digest_file(path)}" if path.is_file() else ""
    except OSError:  # the check before writing reports this with a clearer error
        return ""


def require_absent(path: Path, force: bool) -> None:
    """Refuse an output file that exists, unless it is to be replaced. Raises OutputError."""
    from vectors.errors import OutputError

    if not force and path.is_file():
        raise OutputError(f"the output {path} exists", "choose another --out, or replace it: --force", path=path)


def require_page(path: Path | None, force: bool) -> None:
    """Refuse a page that can't be written, or that exists, before any work. Raises UsageError, OutputError."""
    from vectors.errors import UsageError
    from vectors.storage.files import require_writable

    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise UsageError(
            f"the name {path.name} of the page does not end in .html", f"--html {path.with_suffix('.html')}"
        )
    require_absent(path, force)
    require_writable(path)


def write_page(path: Path, text: str) -> None:
    """Write a page atomically. Raises OutputError."""
    from vectors.storage.files import write_atomically

    write_atomically(path, text.encode())


def figure(value: float) -> str:
    """A figure as a cell of a table, `-` where there is none."""
    return "-" if value != value else f"{value:.3f}"


def next_model(reference: str) -> str:
    """The --model option that a printed next command needs: a vector does not record where a folder lies."""
    import os
    import shlex

    return f" --model {shlex.quote(reference)}" if os.path.isdir(reference) else ""


def say_preparing(reference: str) -> None:
    """Print a note when the bundled model must be converted first, which takes half a minute and happens once."""
    from vectors import references
    from vectors.storage import bundled

    if reference == references.DEFAULT and not bundled.folder().is_dir():
        say(f"preparing the bundled model {reference} (once, about half a minute)")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """A table as plain text."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def side_by_side(titles: Sequence[str], texts: Sequence[str]) -> str:
    """Texts in columns, as plain text as wide as the terminal; one below the other where columns are too narrow."""
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


def _draw_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, title in enumerate(header):
        drawn.add_column(Text(clean(title)), justify="left" if column < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    Console().print(drawn)


def _draw_tokens(tokens: Sequence[tuple[str, float, bool]], centre: float, width: float) -> None:
    from rich.console import Console
    from rich.text import Text

    from steer.reports.tokens import shade

    console = Console()
    drawn = Text()
    for text, value, counts in tokens:
        colour, strength = shade(value, centre, width)
        if console.color_system in ("truecolor", "256"):
            red, green, blue = (round(0.85 * strength * part) for part in colour)
            style = f"white on rgb({red},{green},{blue})" if strength else ""
        else:  # eight colours have no shades
            style = ("yellow" if value > centre else "blue") + " bold" * (strength > 0.6) if strength > 0.2 else ""
        drawn.append(clean(text), style if counts else "dim")
    console.print(drawn)


def _draw_texts(titles: Sequence[str], texts: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    for title in titles:
        drawn.add_column(Text(clean(title)), ratio=1, overflow="fold")
    drawn.add_row(*(Text(clean(text.strip())) for text in texts))
    Console().print(drawn)
