"""Groups of commands, found by listing a folder: one command per file, imported when it runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import click

from vectors.errors import UsageError
from vectors.registry.plugins import suggestion


class ListedCommands(click.Group):
    """The commands of a package by module name, without a trailing underscore; each module defines `command`.

    `package` is the package's name, and `folders` its `__path__`.
    """

    def __init__(self, *args: Any, package: str = "", folders: Iterable[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.package, self.folders = package, folders

    def _files(self) -> dict[str, str]:
        modules = (m.name for m in pkgutil.iter_modules(self.folders) if not m.name.startswith("_"))
        return {name.rstrip("_"): name for name in modules}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return sorted(self._files())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names. Raises UsageError with the one that is probably meant."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            near = suggestion(args[0], self.list_commands(ctx))
            path = ctx.command_path
            hint = f"did you mean {path} {near}? see {path} --help" if near else f"see {path} --help"
            raise UsageError(f"No such command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a name; None for one that is not listed. Raises UsageError for a module that has none."""
        if name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{self.package}.{self._files()[name]}")
        command: click.Command | None = getattr(module, "command", None)
        if command is None:
            raise UsageError(f"{module.__file__} defines no click command called `command`", "see docs/add-a-method.md")
        return command
