"""The command line: one noun or verb a file of `steer/cli/commands`, found by listing the folder.

A command module has `command`, a click command. What is heavy is imported inside the function that uses it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from steer.cli import commands, options
from steer.cli.output import out
from vectors.errors import SteerError, UsageError

TERMINATED = 128 + signal.SIGTERM  # as a shell says it


class _Commands(click.Group):
    """The modules of the folder by name; each is imported when it is asked for. A trailing underscore is dropped."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(m.name.rstrip("_") for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        files = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(commands.__path__)}
        module = importlib.import_module(f"steer.cli.commands.{files[name]}")
        command: click.Command | None = getattr(module, "command", None)
        if command is None:
            raise UsageError(f"{module.__file__} defines no click command called `command`", "see docs/add-a-method.md")
        return command


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from steer import __version__

        click.echo(f"steer {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@options.common
@click.option(
    "--version", is_flag=True, callback=_version, is_eager=True, expose_value=False, help="Print the version."
)
def root() -> None:
    """The workbench for the behaviour of language models.

    \b
    steer extract --pos warm.jsonl --neg cold.jsonl     a steering vector from two files of examples
    steer try warm.safetensors -p "I lost my keys."     the same prompt at several strengths
    steer vectors show warm.safetensors                 what a vector is, and what was measured
    """


class Terminated(SystemExit):
    """SIGTERM has come: everything is left as after Ctrl-C."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage."""
    atexit.register(
        gc.freeze
    )  # to look once more for garbage, of all that was imported, would take a fifth of a second
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; return the exit code. Every failure is one clear error, a traceback only with --debug."""
    shared: dict[str, Any] = {"debug": bool(os.environ.get("STEER_DEBUG"))}
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    out.begin(json="--json" in own)
    with warnings.catch_warnings(), _ended_by_sigterm():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, category, *_rest: (
            out.warn(str(message)) if issubclass(category, UserWarning) else None
        )
        try:
            root.main(arguments, prog_name="steer", standalone_mode=False, obj=shared)
            return 0
        except BrokenPipeError:
            # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            if shared["debug"] and not isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
                traceback.print_exc()
            return _report(error)


def _report(error: BaseException) -> int:
    """Print what ended the command; return the exit code."""
    again = "no file is left half-written; run it again"
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case click.exceptions.NoArgsIsHelpError():  # nobody is wrong who names a group to see what it holds
            click.echo(error.format_message())
            return 0
        case click.ClickException():
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "steer"
            out.fail([error.format_message()], f"{where} --help")
            return error.exit_code
        case SteerError():
            out.fail(error.problems, error.hint)
            return error.exit_code
        case Terminated():
            out.fail(["ended by SIGTERM"], again)
            return TERMINATED
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt() | click.Abort():
            out.fail(["interrupted"], again)
        case MemoryError():
            out.fail(["out of memory"], "use a smaller model, --dtype bfloat16, or fewer --layers")
        case _:  # the last net: a defect of ours still ends in one line, and names itself as one
            problem = f"{type(error).__name__}: {error}"
            out.fail([problem], "this is a defect of steer; run again with --debug and report it")
    return 1


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises, so that whatever is half done is taken back; not where somebody has decided otherwise."""

    def end(_signal: int, _frame: object) -> NoReturn:
        raise Terminated(TERMINATED)

    # A process that trains for another waits inside a barrier, where no handler of Python's would run: it just ends.
    helps = os.environ.get("RANK", "0") != "0"
    main = threading.current_thread() is threading.main_thread()
    ours = main and not helps and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
