"""Sphinx builds the Markdown of this folder: .venv/bin/python -m sphinx -W docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import click

from steer.cli import root

project = "steer"
author = "the steer authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_mock_imports: list[str] = []


def write_commands() -> None:
    """The reference of the commands, from the commands themselves, so that it can't be wrong."""
    lines = ["# Commands\n", "What `--help` prints, for every command.\n"]

    def show(command: click.Command, path: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path.split()[-1], parent=parent, **command.context_settings)
        context.terminal_width = 100
        lines.append(f"## {path}\n\n```text\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                show(found, f"{path} {name}", context)

    show(root, "steer", None)
    target = Path(__file__).parent / "commands.md"
    text = "\n".join(lines)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


write_commands()
