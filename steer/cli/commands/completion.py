"""`steer completion`: the shell script that completes commands, options, models, vectors and methods."""

from __future__ import annotations

import click

from steer.cli import options
from steer.cli.output import out


@options.command(
    summary="Print the completion script for bash, zsh or fish.",
    examples="""
    steer completion bash >~/.local/share/bash-completion/completions/steer
    steer completion zsh >~/.zfunc/_steer
    steer completion fish >~/.config/fish/completions/steer.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="The shell the script is for.")
def command(shell: str) -> None:
    """Print the script that lets a shell complete commands, options, models, vectors, methods and optimisers."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None
    source = completer(click.get_current_context().find_root().command, {}, "steer", "_STEER_COMPLETE")
    script = source.source_template % source.source_vars()  # click's own function would run bash to check its version
    out.result({"shell": shell, "script": script}, lambda: out.line(script))
