"""The command line: one noun or verb a file of `steer/cli/commands`, found by listing the folder.

A command module has `command`, a click command. What is heavy is imported inside the function that uses it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pkgutil
import sys
import traceback
import warnings
from typing import Any

import click

from steer.cli import commands
from steer.cli.output import fail, warn
from vectors.errors import SteerError


class _Commands(click.Group):
    """The modules of the folder by name; each is imported when it is asked for. A trailing underscore is dropped."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(m.name.rstrip("_") for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        files = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(commands.__path__)}
        found: click.Command = importlib.import_module(f"steer.cli.commands.{files[name]}").command
        return found


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from steer import __version__

        click.echo(f"steer {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback when something fails; so does STEER_DEBUG=1.")
@click.option(
    "--version", is_flag=True, callback=_version, is_eager=True, expose_value=False, help="Print the version."
)
@click.pass_context
def root(ctx: click.Context, debug: bool) -> None:
    """The workbench for the behaviour of language models.

    \b
    steer extract --pos warm.jsonl --neg cold.jsonl     a steering vector from two files of examples
    steer try warm.safetensors -p "I lost my keys."     the same prompt at several strengths
    steer vectors show warm.safetensors                 what a vector is, and what was measured
    """
    if debug:
        ctx.ensure_object(dict)["debug"] = True


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage."""
    atexit.register(
        gc.freeze
    )  # to look once more for garbage, of all that was imported, would take a fifth of a second
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; return the exit code. Every failure is one clear error, a traceback only with --debug."""
    shared: dict[str, Any] = {"debug": bool(os.environ.get("STEER_DEBUG"))}
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, category, *_rest: (
            warn(str(message)) if issubclass(category, UserWarning) else None
        )
        try:
            root.main(arguments, prog_name="steer", standalone_mode=False, obj=shared)
            return 0
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.exceptions.NoArgsIsHelpError as error:  # nobody is wrong who names a group to see what it holds
            click.echo(error.format_message())
            return 0
        except click.ClickException as error:
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "steer"
            fail([error.format_message()], f"{where} --help")
            return error.exit_code
        except SteerError as error:
            _show(shared)
            fail(error.problems, error.hint)
            return error.exit_code
        except (KeyboardInterrupt, click.Abort):
            fail(["interrupted"], "no file is left half-written; run it again")
            return 1
        except BrokenPipeError:
            # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except MemoryError:
            _show(shared)
            fail(["out of memory"], "use a smaller model, --dtype bfloat16, or fewer --layers")
            return 1
        except Exception as error:  # the last net: a defect of ours still ends in one line, and names itself as one
            _show(shared)
            fail(
                [f"{type(error).__name__}: {error}"], "this is a defect of steer; run again with --debug and report it"
            )
            return 1


def _show(shared: dict[str, Any]) -> None:
    if shared["debug"]:
        traceback.print_exc()
