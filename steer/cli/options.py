"""The options that several commands share, said once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from steer.cli.requests import Command, parse_named

File = click.Path(path_type=Path)


def command(name: str | None = None, *, summary: str, examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with its examples last, `--debug`, and defaults shown; `summary` is its line in a list."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        function = click.option(
            "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show a traceback when something fails."
        )(function)
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        made = click.command(name, Command, epilog=epilog, short_help=summary, context_settings={"show_default": True})
        return made(function)

    return wrap


def _debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
seed = click.option("--seed", default=0, show_default=True, help="Where all randomness comes from.")
any_base = click.option("--any-base", is_flag=True, help="Allow vectors of other models of the same size.")


def devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--device` and `--dtype`."""
    function = click.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16.")(function)
    return click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")(function)


def bindings(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--vector NAME=FILE`, given to the command as `vectors`: a dictionary from names to paths."""

    @functools.wraps(function)
    def parsed(*args: Any, vectors: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, vectors=parse_bindings(vectors), **kwargs)

    return click.option(
        "--vector", "vectors", multiple=True, metavar="NAME=FILE", help="What a name in the expression stands for."
    )(parsed)


class Bytes(click.ParamType[int]):
    """A size such as 2GiB, 500MB or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no size, such as 2GiB", param, ctx)
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def merging(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--memory`, `--threads` and `--device`."""
    function = click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="cpu, cuda or cuda:N: computes the elements, with the same bits.",
    )(function)
    function = click.option("--threads", type=click.IntRange(1), help="How many.  [default: one for each core]")(
        function
    )
    return click.option("--memory", type=Bytes(), default="2GiB", help="The most to use beyond mapped files.")(function)


def parse_bindings(texts: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=FILE` options. Raises UsageError with every bad one."""
    found = parse_named(texts, "--vector", "FILE")
    return {name: Path(file) for name, file in found.items()}
