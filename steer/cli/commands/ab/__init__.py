"""`steer ab`: experiments on live traffic. One subcommand per file of this folder, found by listing it."""

from __future__ import annotations

import importlib
import pkgutil

import click

from vectors.errors import UsageError
from vectors.registry.plugins import suggestion


class _Subcommands(click.Group):
    """The subcommands by module name; a module is imported when its subcommand runs or is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that the first argument names. Raises UsageError with the one that is probably meant."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            near = suggestion(args[0], self.list_commands(ctx))
            hint = f"did you mean steer ab {near}? see steer ab --help" if near else "see steer ab --help"
            raise UsageError(f"No such command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{name}").command
        return command


@click.group(cls=_Subcommands, short_help="Compare arms on live traffic: assign, log, guard, decide.")
def command() -> None:
    """Compare arms on live traffic: assign, log, guard, decide.

    \b
    steer ab init tone.yaml --arm control= --arm friendly='1.2*warm' --metric thumbs
    steer ab check tone.yaml
    steer serve smollm2 --experiment tone.yaml
    """
