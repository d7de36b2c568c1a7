"""Typed requests as options: what a command takes is derived from the fields of frozen dataclasses.

    @dataclass(frozen=True, kw_only=True)
    class Request:
        model: str = option("smollm2", help="A model folder, a hub id or the bundled smollm2.", complete="models")
        steps: int = option(200, help="Steps of the optimiser.", low=1)

    @options.command(summary="...", examples="...")
    @requests.takes(Request)
    def command(**values: Any) -> None:
        request = requests.build(Request, values)

A field whose type is such a dataclass itself contributes its own fields. The options of several requests (the modes of
one command) stand beside each other, each once; `build` makes one of them, and `not_of` names what was typed that it
has no field for. The modules that define requests are imported for every `--help`: they import nothing heavy.
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
from vectors.errors import SteerError, UsageError, kept, raise_together
from vectors.options import OPTION, Flag, problems_of

R = TypeVar("R")


class Field(NamedTuple):
    """One field of a request: its name, its type without None, whether None is among its values, and its facts."""

    name: str
    type: Any
    optional: bool
    default: Any  # dataclasses.MISSING where it is required
    flag: Flag


class RequestOption(click.Option):
    """An option whose help is finished when it is printed, since it may list a registry."""

    def __init__(self, declarations: list[str], flag: Flag, **attributes: Any) -> None:
        self.flag = flag
        super().__init__(declarations, **attributes)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The two columns of the help, with what the registry lists."""
        self.help = filled(self.flag)
        return super().get_help_record(ctx)


def filled(flag: Flag) -> str:
    """The help text, with `{names}` replaced by what the registry lists, and the default where it has words."""
    text = flag.help.replace("{names}", ", ".join(flag.names())) if flag.names else flag.help
    return f"{text}  [default: {flag.default_text}]" if flag.default_text else text


def fields_of(request: type) -> Iterator[Field]:
    """The options of a request type, those of requests inside it among them."""
    hints = typing.get_type_hints(request)
    for field in dataclasses.fields(request):
        kind = hints[field.name]
        union = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else ()
        optional = type(None) in union
        kind = next((one for one in union if one is not type(None)), kind)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if OPTION in field.metadata:
            yield Field(field.name, kind, optional, default, field.metadata[OPTION])
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from fields_of(kind)


def parameters(*requests: type) -> list[click.Parameter]:
    """The click parameters of one request, or of several, each field once. Raises TypeError when two disagree."""
    fields: dict[str, Field] = {}
    for request in requests:
        for field in fields_of(request):
            if fields.setdefault(field.name, field).flag != field.flag:
                raise TypeError(f"{request.__name__}.{field.name} differs from another request's field of this name")
    return [_parameter(field) for field in fields.values()]


class Command(click.Command):
    """A command that still takes the words of earlier releases, with a warning, and has headings in its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with each old word replaced by the one that took its place."""
        found = [parameter for parameter in self.params if isinstance(parameter, RequestOption)]
        new = {old: max(parameter.opts, key=len) for parameter in found for old in parameter.flag.old}
        for place, argument in enumerate(args):
            word, equals, value = argument.partition("=")
            if word == "--":
                break
            if word in new:
                warn(f"{word} is called {new[word]} now; the old word goes with the next release")
                args[place] = new[word] + equals + value
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options: those of the request, the common ones, and those with a group under its heading."""
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


def build(request: type[R], values: Mapping[str, Any]) -> R:
    """A request from the values of click's parameters. Raises UsageError with everything that is wrong with them."""
    errors: list[SteerError] = []
    made = _build(request, values, errors)
    raise_together(errors)
    assert made is not None
    problems = problems_of(made)
    if problems:
        context = click.get_current_context(silent=True)
        raise UsageError(problems, f"see {context.command_path if context else 'steer'} --help")
    return made


def _build(request: type[R], values: Mapping[str, Any], errors: list[SteerError]) -> R | None:
    given: dict[str, Any] = {}
    own = {field.name: field for field in fields_of(request)}
    hints = typing.get_type_hints(request)
    for field in dataclasses.fields(request):  # type: ignore[arg-type]
        if OPTION in field.metadata and field.name in values:
            value = values[field.name]
            if value is None or value == ():
                continue  # not given: the default of the field
            with kept(errors):
                given[field.name] = _value(own[field.name], value)
        elif isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(hints[field.name], values, errors)
    return None if errors else request(**given)


def _value(field: Field, value: Any) -> Any:
    if field.flag.parse is not None:
        return field.flag.parse(value)
    if _named(field):
        kind = typing.get_args(field.type)[1]
        pairs = parse_named(value, field.flag.word(field.name), (field.flag.metavar or "NAME=VALUE").partition("=")[2])
        return {name: kind(text) if kind in (Path, int, float) else text for name, text in pairs.items()}
    return value


def parse_named(texts: tuple[str, ...], word: str, what: str) -> dict[str, str]:
    """Options of the form NAME=... in their order. Raises UsageError with every bad one."""
    found: dict[str, str] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            problems.append(f"{word} {text!r} is not NAME={what}")
        elif name in found:
            problems.append(f"{word} {name} is given twice")
        else:
            found[name] = value
    if problems:
        raise UsageError(problems, f"write {word} NAME={what}")
    return found


def typed(context: click.Context) -> dict[str, str]:
    """The options that stand on the command line: names of fields, and the words a user knows them by."""
    return {
        name: max(parameter.opts, key=len)
        for parameter in context.command.params
        if (name := parameter.name or "")
        and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and isinstance(parameter, click.Option)
    }


def not_of(request: type, requests: tuple[type, ...], context: click.Context | None = None) -> list[str]:
    """The words on the command line that belong to others of `requests`, and not to `request`."""
    own = {field.name for field in fields_of(request)}
    others = {field.name for other in requests for field in fields_of(other)} - own
    return [word for name, word in typed(context or click.get_current_context()).items() if name in others]


def takes(*requests: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a click command's function the options of requests, before its others."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        # click reads this attribute, and takes what was added last as first.
        present = getattr(function, "__click_params__", [])
        function.__click_params__ = [*present, *reversed(parameters(*requests))]  # type: ignore[attr-defined]
        return function

    return wrap
