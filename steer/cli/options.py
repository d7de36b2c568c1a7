"""The options that several commands share, each defined once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from steer.cli.output import out
from steer.cli.requests import Command
from vectors.errors import UsageError
from vectors.registry.options import Option, option
from vectors.registry.plugins import suggestion

File = click.Path(path_type=Path)
A_MODEL = "a folder, a hub id (org/name@revision), or the bundled smollm2."
MODEL = "A" + A_MODEL[1:]
TOKENS = (
    "Which tokens of an example count: completion, last, all, an index such as 0 or -1, or prompt (the last token of "
    "the prompt as a server sees it, which @when: reads)."
)


class NamedChoice(click.Choice[str]):
    """A choice of names, whose error suggests the closest one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The message for a name that is none of the choices."""
        near = suggestion(str(value), map(str, self.choices))
        return super().get_invalid_choice_message(value, ctx) + (f" Did you mean {near}?" if near else "")


def command(name: str | None = None, *, summary: str, examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with the common options; its help ends in `examples`. `summary` is its line in `steer --help`."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        decorate = click.command(
            name, Command, epilog=epilog, short_help=summary, context_settings={"show_default": True}
        )
        return decorate(common(function))

    return wrap


def subcommand(group: click.Group, name: str, summary: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command of a group such as `steer vectors`, with the common options; `summary` is its line in the group."""
    return lambda function: group.command(
        name, cls=Command, short_help=summary, context_settings={"show_default": True}
    )(common(function))


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, `--quiet` and `--debug` to a command."""
    for words, callback, text in (
        (("--debug",), _debug, "Show a traceback on failure, as STEER_DEBUG=1 does."),
        (("-q", "--quiet"), _quiet, "Print only data and errors."),
        (("--json",), _json, "Print one JSON object, also on failure."),
    ):
        option_ = click.option(*words, is_flag=True, is_eager=True, expose_value=False, callback=callback, help=text)
        function = option_(function)
    return function


def _debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


def _quiet(_ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    out.quiet |= value


def _json(_ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    out.json |= value


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The device and dtype that a model runs in."""

    device: str = option("auto", help="The device to compute on: auto, cpu, cuda, cuda:N or mps.", group="Computing")
    dtype: str = option("auto", help="The dtype to compute in: auto, float32, bfloat16 or float16.", group="Computing")


@dataclass(frozen=True, kw_only=True)
class ReadByProbe:
    """How a trained probe reads examples."""

    layer: int | None = option(
        None, help="The layer to read.", low=0, default_text="the one that the probe recommends", group="Reading"
    )
    tokens: str | None = option(None, help=TOKENS, default_text="as the probe was trained", group="Reading")
    pool: str | None = option(
        None, help="How the score of a text follows from those of its tokens.", choices=("mean", "max", "last"),
        default_text="as the probe was trained", group="Reading",
    )  # fmt: skip
    model: str | None = option(
        None, help=MODEL, default_text="the model the probe was trained on", complete="models", group="Reading"
    )
    allow_overlap: bool = option(
        False, help="Allow examples that the probe was trained on; the report repeats it.", group="Reading"
    )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Whether the work is spread over a cluster."""

    ray: str | None = option(
        None, help="Spread the work over a Ray cluster, with the same numbers: its address, or local for one on this "
        "machine's cores (extra scale).", metavar="ADDRESS|local", group="Computing",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The random seed."""

    seed: int = option(0, help="The random seed.", group="Computing")


@dataclass(frozen=True, kw_only=True)
class Bindings:
    """The vectors that names in an expression stand for."""

    vectors: Mapping[str, Path] = option(
        {}, help="The vector file for a name in the expression; may be given several times.", flag="--vector",
        metavar="NAME=FILE", complete="vectors",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnyBase:
    """Whether vectors of other models are allowed."""

    any_base: bool = option(False, help="Allow vectors of other models of the same size.")


@dataclass(frozen=True, kw_only=True)
class AllowStrength:
    """Whether strengths far beyond the recommended one are allowed."""

    allow_strength: bool = option(False, help="Allow strengths beyond twenty times the recommended one.")


def size(text: str) -> int:
    """A size such as 2GiB, 500MB or a number of bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a size", "write 2GiB, or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


@dataclass(frozen=True, kw_only=True)
class Force:
    """Whether an output file that exists is replaced."""

    force: bool = option(False, help="Replace the output file if it exists.")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """The number of threads."""

    threads: int | None = option(
        None,
        help="The number of threads that compute and write.",
        low=1,
        default_text="one for each core",
        group="Computing",
    )


@dataclass(frozen=True, kw_only=True)
class Merging(Threads):
    """The memory, threads and device that a merge may use."""

    memory: int = option(
        2 * 2**30,
        help="The most memory to use, not counting mapped files.",
        parse=size,
        metavar="SIZE",
        default_text="2GiB",
        group="Computing",
    )
    device: str = option(
        "cpu",
        help="The device for elementwise work: cpu, cuda or cuda:N. The result is the same, bit for bit.",
        group="Computing",
    )


def print_options(name: str, options: Iterable[Option]) -> None:
    """Print the options of a method or an optimiser: name, default, range and meaning of each."""
    options = list(options)
    rows = option_rows(options)

    def show() -> None:
        if rows:
            out.table(["option", "default", "range", "meaning"], rows, 4)
        else:
            out.line(f"{name} has no options")

    out.result({"name": name, "options": option_values(options)}, show)


def option_rows(options: Iterable[Option]) -> list[list[str]]:
    """Name, default, range and meaning of each option, as cells."""
    return [[o.name, str(o.default), _range(o), o.meaning] for o in options]


def option_values(options: Iterable[Option]) -> dict[str, dict[str, Any]]:
    """Default, range and meaning of each option as JSON values, by name."""
    return {o.name: {"default": o.default, "range": _range(o), "meaning": o.meaning} for o in options}


def _range(item: Option) -> str:
    if item.choices:
        return ", ".join(item.choices)
    return "true, false" if isinstance(item.default, bool) else item.range()
