"""Typed requests as options: the options of a command are derived from the fields of frozen dataclasses.

    @dataclass(frozen=True, kw_only=True)
    class Request:
        model: str = option("smollm2", help="A model folder, a hub id or the bundled smollm2.", complete="models")
        steps: int = option(200, help="Steps of the optimiser.", low=1)

    @options.command(summary="...", examples="...")
    @requests.takes(Request)
    def command(**values: Any) -> None:
        request = requests.build(Request, values)

A field whose type is itself such a dataclass contributes that dataclass's fields. A command with several modes takes
the options of several requests, each option once; `build` makes the request of one mode, and `not_of` lists the
options on the command line that this request has no field for. The modules that define requests are imported for every
`--help`, so they import nothing heavy.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from steer.cli import completion
from steer.cli.output import warn
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.registry.options import OPTION, Flag, problems_of_option

R = TypeVar("R")


class Field(NamedTuple):
    """One field of a request: its name, its type without None, whether it may be None, its default and its flag."""

    name: str
    type: Any
    optional: bool
    default: Any  # dataclasses.MISSING for a required field
    flag: Flag


class RequestOption(click.Option):
    """An option whose help text is completed when it is printed, since it may list the names of a registry."""

    def __init__(self, declarations: list[str], flag: Flag, **attributes: Any) -> None:
        self.flag = flag
        super().__init__(declarations, **attributes)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The two columns of the help, with the names of the registry filled in."""
        self.help = filled(self.flag)
        return super().get_help_record(ctx)


def filled(flag: Flag) -> str:
    """The help text with `{names}` replaced by the names of the registry, and with the default's description."""
    text = flag.help.replace("{names}", ", ".join(flag.names())) if flag.names else flag.help
    return f"{text}  [default: {flag.default_text}]" if flag.default_text else text


def fields_of(request: type) -> Iterator[Field]:
    """The fields of a request type that are options, including those of nested request types."""
    hints = typing.get_type_hints(request)
    for field in dataclasses.fields(request):
        kind = hints[field.name]
        union = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else ()
        optional = type(None) in union
        kind = next((member for member in union if member is not type(None)), kind)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if OPTION in field.metadata:
            yield Field(field.name, kind, optional, default, field.metadata[OPTION])
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from fields_of(kind)


def parameters(*requests: type) -> list[click.Parameter]:
    """The click parameters of requests, each field once. Raises TypeError when two requests define one differently."""
    fields: dict[str, Field] = {}
    for request in requests:
        for field in fields_of(request):
            if fields.setdefault(field.name, field).flag != field.flag:
                raise TypeError(f"{request.__name__}.{field.name} differs from another request's field of this name")
    return [_parameter(field) for field in fields.values()]


LATER = "later_parameters"  # the attribute of a command's function that `takes_later` sets


class Command(click.Command):
    """A command that accepts the option names of earlier releases with a warning, and groups options in its help."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, with those of `takes_later`, which are made once."""
        later = getattr(self.callback, LATER, None)
        if later is not None:
            self.params += later()
            delattr(self.callback, LATER)
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with each old option name replaced by the new one."""
        renamed = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, RequestOption)]
        new = {old: max(parameter.opts, key=len) for parameter in renamed for old in parameter.flag.old}
        for i, argument in enumerate(args):
            word, equals, value = argument.partition("=")
            if word == "--":
                break
            if word in new:
                warn(f"{word} is deprecated and will be removed in the next release; use {new[word]}")
                args[i] = new[word] + equals + value
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options: first those without a group and the common ones, then each group under its heading."""
        grouped: dict[str, list[tuple[str, str]]] = {"": []}
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            if isinstance(parameter, RequestOption):
                grouped.setdefault(parameter.flag.group, []).append(record)
            else:
                common.append(record)
        grouped[""] += common
        for heading, records in grouped.items():
            with formatter.section(heading or "Options"):
                formatter.write_dl(records)


def _parameter(field: Field) -> click.Parameter:
    flag, kind, several = field.flag, field.type, _several(field)
    item = (typing.get_args(kind) or (str,))[0 if typing.get_origin(kind) is tuple else -1] if several else kind
    attributes: dict[str, Any] = {
        "type": str if flag.parse or _named(field) else _type(item),
        "metavar": flag.metavar or ("|".join(flag.choices) if flag.choices else None),
        "required": field.default is dataclasses.MISSING,
        "shell_complete": completion.completer(flag),
    }
    if flag.argument:
        return click.Argument([field.name], nargs=-1 if several else 1, help=flag.help, **attributes)
    if several:
        attributes |= {"multiple": True, "metavar": flag.metavar or ("NAME=VALUE" if _named(field) else None)}
    plain = not several and flag.parse is None and field.default is not dataclasses.MISSING
    if plain or several:
        attributes["default"] = field.default if plain else ()
    attributes["show_default"] = plain and not flag.default_text and field.default not in (None, "", False)
    if flag.parse is not None and not flag.default_text and isinstance(field.default, str | int | float):
        flag = flag._replace(default_text=str(field.default))
    words = [*(flag.words or (flag.word(field.name),))]
    if kind is bool:
        if field.default is False:
            attributes["is_flag"] = True
        else:
            words[-1] = f"{words[-1]}/--no-{words[-1].removeprefix('--')}"
        attributes = {k: v for k, v in attributes.items() if k not in ("type", "metavar", "shell_complete")}
    return RequestOption([field.name, *words], flag, **attributes)


def _several(field: Field) -> bool:
    return typing.get_origin(field.type) is tuple or _named(field)


def _named(field: Field) -> bool:
    return typing.get_origin(field.type) in (Mapping, dict)


def _type(kind: Any) -> Any:
    return click.Path(path_type=Path) if kind is Path else kind if kind in (int, float, bool) else str


def build(request: type[R], values: Mapping[str, Any], errors: list[SteerError] | None = None) -> R:
    """A request from the values of click's parameters. Raises UsageError with every problem.

    With `errors` problems are collected there instead, and an option that has one keeps its default, so that the
    command can report what else is wrong with its input; it must raise them before any work. They are raised here where
    an option that has one has no default, or binds names, which others use.
    """
    found: list[SteerError] = []
    built = _build(request, values, found, defaults=errors is not None)
    if errors is None or built is None:
        raise_together(found)
    assert built is not None
    if errors is not None:
        errors += found
    return built


def _build(request: type[R], values: Mapping[str, Any], errors: list[SteerError], defaults: bool) -> R | None:
    given: dict[str, Any] = {}
    fields = {field.name: field for field in fields_of(request)}
    hints = typing.get_type_hints(request)
    for field in dataclasses.fields(request):  # type: ignore[arg-type]
        if OPTION in field.metadata and field.name in values:
            value = values[field.name]
            if value is None or value == ():
                continue  # not given: the default of the field
            with collecting(errors):
                read = _value(fields[field.name], value)
                _require_allowed(fields[field.name], read)
                given[field.name] = read
        elif isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(hints[field.name], values, errors, defaults)
    needed = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING or (_named(field) and values.get(name))
    }
    # A nested request that could not be made is None.
    whole = all(
        given.get(field.name) is not None
        for field in dataclasses.fields(request)  # type: ignore[arg-type]
        if field.name in given or field.name in needed
    )
    return request(**given) if not errors or (defaults and whole) else None


def _value(field: Field, value: Any) -> Any:
    if field.flag.parse is not None:
        return field.flag.parse(value)
    if _named(field):
        kind = typing.get_args(field.type)[1]
        pairs = parse_named(value, field.flag.word(field.name), (field.flag.metavar or "NAME=VALUE").partition("=")[2])
        return {name: kind(text) if kind in (Path, int, float) else text for name, text in pairs.items()}
    return value


def _require_allowed(field: Field, value: Any) -> None:
    """Refuse an unknown choice, or a number out of range. Raises UsageError."""
    problems = problems_of_option(field.flag, field.name, value)
    if problems:
        context = click.get_current_context(silent=True)
        raise UsageError(problems, f"see {context.command_path if context else 'steer'} --help")


def parse_named(texts: tuple[str, ...], word: str, what: str) -> dict[str, str]:
    """Parse option values of the form NAME=VALUE, in order. Raises UsageError with every malformed one."""
    values: dict[str, str] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            problems.append(f"{word} {text!r} is not NAME={what}")
        elif name in values:
            problems.append(f"{word} {name} is given twice")
        else:
            values[name] = value
    if problems:
        raise UsageError(problems, f"write {word} NAME={what}")
    return values


def typed(context: click.Context) -> dict[str, str]:
    """The options on the command line: from names of fields to the names of their options, such as --lr."""
    return {
        name: max(parameter.opts, key=len)
        for parameter in context.command.params
        if (name := parameter.name or "")
        and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and isinstance(parameter, click.Option)
    }


def not_of(request: type, requests: tuple[type, ...], context: click.Context | None = None) -> list[str]:
    """The options on the command line that belong to another of `requests`, and not to `request`."""
    names = {field.name for field in fields_of(request)}
    others = {field.name for other in requests for field in fields_of(other)} - names
    return [word for name, word in typed(context or click.get_current_context()).items() if name in others]


def takes(*requests: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds the options of requests to a click command's function, before its other options."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        # click reads this attribute in reverse order.
        present = getattr(function, "__click_params__", [])
        function.__click_params__ = [*present, *reversed(parameters(*requests))]  # type: ignore[attr-defined]
        return function

    return wrap


def takes_later(make: Callable[[], list[click.Parameter]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds the parameters that `make` returns when the command is run or its help is printed.

    For options that a registry determines: `steer --help` imports every command, and reading a registry is slow.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, LATER, make)
        return function

    return wrap
