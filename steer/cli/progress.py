"""Progress on stderr, from events: a bar with the time left on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from steer.cli.terminal import clean
from vectors.events import Event

EVERY = 30.0  # seconds between two lines of one stage, where stderr is not a terminal


class Progress:
    """A context manager that is called with events and shows the present stage."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self.drawn = quiet, not quiet and sys.stderr.isatty()
        self.stage, self.began, self.printed_at = "", 0.0, 0.0
        self.bars: Any = None  # a rich.progress.Progress, from the first event on
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()

    def end(self) -> None:
        """End the present stage and take its bar away, as before a question to a person; the next event begins one."""
        if self.bars is not None:
            self.bars.stop()
        self.bars = self.task = None
        self.stage = ""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self.quiet:
            return
        begins = event.stage != self.stage
        if begins:
            self.stage, self.began = event.stage, time.monotonic()
            self.printed_at = self.began
        if self.drawn:
            self._draw(event, begins)
        else:
            self._print_line(event, begins)

    def print(self, text: str) -> bool:
        """Print a line above the progress bar; return False where no bar is shown."""
        if self.bars is None:
            return False
        from rich.text import Text

        self.bars.console.print(Text(clean(text)), soft_wrap=True)
        return True

    def _draw(self, event: Event, begins: bool) -> None:
        if self.bars is None:
            self.bars = _bars()
            self.bars.start()
        if begins:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.task = self.bars.add_task(clean(event.stage), total=event.total, count="", metrics="")
        count = _count(event)
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
        self.bars.update(
            self.task, completed=event.done or 0, total=event.total, count=clean(count), metrics=clean(metrics)
        )
        if event.message:
            self.print(event.message)

    def _print_line(self, event: Event, begins: bool) -> None:
        now = time.monotonic()
        if event.message:
            line = event.message
        elif begins and event.total is None:
            line = f"{event.stage} …"
        elif event.total and event.done and now - self.printed_at >= EVERY:
            left = (now - self.began) / event.done * (event.total - event.done)
            line = f"{event.stage} {_count(event)}, {left:.0f} s left"
        else:
            return
        self.printed_at = now
        print(clean(line), file=sys.stderr, flush=True)


def _count(event: Event) -> str:
    if event.total is None:
        return ""
    done = min(event.done or 0, event.total)
    if event.unit == "bytes":
        return f"{done / 1e9:.2f}/{event.total / 1e9:.2f} GB"
    return f"{done}/{event.total} {event.unit}".rstrip()


def _bars() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=30),
        progress.TextColumn("{task.fields[count]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # stdout carries data, and may be a pipe
    )
