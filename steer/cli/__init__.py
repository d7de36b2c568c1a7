"""The command line: one command per file in `steer/cli/commands`, found by listing the folder.

A command module defines `command`, a click command. Heavy packages are imported inside the function that uses them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

# OpenMP's threads spin while they wait, which starves other processes and themselves on a busy machine (see
# docs/benchmarks.md). Read once when torch is imported, so it is set before; servers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click

from steer.cli import commands, options
from steer.cli.groups import ListedCommands
from steer.cli.output import out
from vectors.errors import SteerError
from vectors.storage.locks import remove_unfinished_of_this_process

TERMINATED = 128 + signal.SIGTERM  # the exit code that a shell gives for it


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from steer import __version__

        click.echo(f"steer {__version__}")
        ctx.exit()


@click.group(
    cls=ListedCommands,
    package=commands.__name__,
    folders=commands.__path__,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options.common
@click.option(
    "--version", is_flag=True, callback=_version, is_eager=True, expose_value=False, help="Print the version."
)
def root() -> None:
    """The workbench for the behaviour of language models.

    \b
    steer extract --pos warm.jsonl --neg cold.jsonl     a steering vector from two files of examples
    steer try warm.safetensors -p "I lost my keys."     the same prompt at several strengths
    steer vectors show warm.safetensors                 the origin, layers and validation of a vector
    """


class Terminated(SystemExit):
    """Raised at SIGTERM, so that the command cleans up as after Ctrl-C."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage."""
    atexit.register(gc.freeze)  # the last garbage collection at exit would take a fifth of a second
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; return the exit code. A failure prints an error; a traceback only with --debug."""
    shared: dict[str, Any] = {"debug": bool(os.environ.get("STEER_DEBUG"))}
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    out.begin(json="--json" in before_dashes)
    with warnings.catch_warnings(), _ended_by_sigterm() as signals:
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, category, *_rest: (
            out.warn(str(message)) if issubclass(category, UserWarning) else None
        )
        try:
            root.main(arguments, prog_name="steer", standalone_mode=False, obj=shared)
            return 0
        except BrokenPipeError:
            # The reader of our output has ended, such as `head`; the interpreter must not report that again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            remove_unfinished_of_this_process()
            if shared["debug"] and not isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
                traceback.print_exc()
            # A library that calls Python back may have put an exception of its own in the place of ours.
            # An exit that a command chose itself stays: to a server, SIGTERM is no failure.
            return _report(error if type(error) is SystemExit or not signals else Terminated(TERMINATED))


def _report(error: BaseException) -> int:
    """Print what ended the command; return the exit code."""
    hint = "no file is left half-written; run the command again"
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case click.exceptions.NoArgsIsHelpError():  # a group without a command shows its help, which is no error
            click.echo(error.format_message())
            return 0
        case click.NoSuchOption() if error.option_name[:2].lstrip("-")[:1] in set("0123456789."):
            where = error.ctx.command_path if error.ctx else "steer"
            hint = f'an expression that begins with a minus stands last, behind --: {where} … -- "-1*NAME"'
            out.fail([error.format_message()], hint)
            return error.exit_code
        case click.ClickException():
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "steer"
            out.fail([error.format_message()], f"{where} --help")
            return error.exit_code
        case SteerError():
            out.fail(error.problems, error.hint)
            return error.exit_code
        case Terminated():
            out.fail(["ended by SIGTERM"], hint)
            return TERMINATED
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt() | click.Abort():
            out.fail(["interrupted"], hint)
        case MemoryError():
            out.fail(["out of memory"], "use a smaller model, --dtype bfloat16, or fewer --layers")
        case OSError():  # a disk or a path that failed where no reader or writer reports it
            where = f"{error.filename}: " if error.filename else ""
            out.fail([f"{where}{error.strerror or error}"], "check the path, its permissions and the free space")
        case _:  # an unexpected exception is a defect of steer, and is reported as one
            problem = f"{type(error).__name__}: {error}"
            out.fail([problem], "this is a defect of steer; run again with --debug and report it")
    return 1


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[list[int]]:
    """Raise Terminated at SIGTERM, so that the command cleans up; a handler that is set already stays. The list that
    the context gives holds the signals that have arrived."""
    arrived: list[int] = []

    def end(number: int, _frame: object) -> NoReturn:
        arrived.append(number)
        raise Terminated(TERMINATED)

    # Other ranks than 0 wait in barriers, where Python runs no signal handler, so there SIGTERM ends the process.
    other_rank = os.environ.get("RANK", "0") != "0"
    main = threading.current_thread() is threading.main_thread()
    handled = main and not other_rank and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if handled:
        signal.signal(signal.SIGTERM, end)
    try:
        yield arrived
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
