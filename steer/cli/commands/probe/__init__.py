"""`steer probe`: linear probes, and what goes on inside of a model; one subcommand per file."""

from __future__ import annotations

import click

from steer.cli.groups import ListedCommands


@click.group(
    cls=ListedCommands,
    package=__name__,
    folders=__path__,
    short_help="Train linear probes and read by them.",
)
def command() -> None:
    """Train linear probes, test and apply them, choose thresholds, and look at what goes on inside of a model.

    \b
    steer probe train --pos warm.jsonl --neg cold.jsonl -o warm-probe.safetensors
    steer probe test warm-probe.safetensors --pos more-warm.jsonl --neg more-cold.jsonl
    steer probe apply warm-probe.safetensors -t "I hope you feel better soon."
    """
