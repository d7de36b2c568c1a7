"""`steer serve`: vLLM with the plugin on."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import click

from steer.cli import options, output
from steer.cli.requests import parse_named


@options.command(
    "serve",
    summary="Serve a model with vLLM, steered per request.",
    examples="""
    steer serve smollm2 --vector warm=warm.safetensors
    steer serve smollm2 --vector warm=w.safetensors --vector formal=f.safetensors --arm friendly='1.2*warm - 0.4*formal'
    steer serve org/name --vector warm=warm.safetensors --port 8001 -- --max-model-len 4096 --api-key secret
    """,
)
@click.argument("model", metavar="MODEL")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_FLAGS]")
@options.bindings
@click.option("--arm", "arms", multiple=True, metavar="NAME=EXPRESSION", help="An arm: the model MODEL:NAME.")
@click.option("--host", default="127.0.0.1", help="Where to listen.")
@click.option("--port", default=8000, type=click.IntRange(1, 65535), help="Where to listen.")
@click.option("--steer-rows", default=256, type=click.IntRange(1, 65535), help="Compositions that can live at once.")
@click.option(
    "--steer-directions",
    default=4,
    type=click.IntRange(0, 64),
    help="ablate and clamp of one composition in one layer.",
)
@click.option(
    "--vector-folder",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder that POST /steer/vectors may load from.",
)
@click.option("--log", type=options.File, help="Where vLLM's own output goes.  [default: a temporary file]")
@options.any_base
def command(
    model: str,
    flags: tuple[str, ...],
    vectors: dict[str, Path],
    arms: tuple[str, ...],
    host: str,
    port: int,
    steer_rows: int,
    steer_directions: int,
    folders: tuple[Path, ...],
    log: Path | None,
    any_base: bool,
) -> None:
    """Serve a model with vLLM, steered per request.

    A request names an arm as its model (MODEL:NAME), or brings an expression in vllm_xargs: {"steer": "0.8*warm"}.
    Everything behind -- goes to `vllm serve` as it is.
    """
    settings: dict[str, Any] = {
        "vectors": {name: str(path.expanduser().absolute()) for name, path in vectors.items()},
        "arms": parse_named(arms, "--arm", "EXPRESSION"),
        "rows": steer_rows,
        "directions": steer_directions,
        "folders": [str(folder.expanduser().absolute()) for folder in folders],
        "any_base": any_base,
    }
    from steer.serving import launch
    from steer.serving import settings as checked
    from steer.serving.engine import admission
    from vectors import references

    output.say_preparing(model)
    source = references.resolve(model)
    identity = references.identity(source)
    # All that can be wrong with vectors and arms is found here, before vLLM spends a minute on its start.
    found = checked.check(settings, Path.cwd())
    admission.Admission(found, identity["hidden_size"], identity["layers"], identity)
    # A process manager ends a service with SIGTERM; it is to end like Ctrl-C, with everything it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = source.name or model
    output.say(f"model {source}")
    with (
        contextlib.suppress(KeyboardInterrupt),  # the way to end it
        launch.served(
            source.path, settings, name=name, host=host, port=port, flags=flags, log=log, waiting=_say_waiting
        ) as server,
    ):
        output.say(f"serving at {server.url}, vLLM's own output is in {server.log}")
        for arm, composition in found.arms.items():
            output.say(f"  {name}:{arm}  {composition}")
        first, vector = next(iter(found.arms), None), next(iter(found.vectors), "NAME")
        asked = f', "vllm_xargs": {{"steer": "{vector}"}}' if first is None else ""
        shown = name if first is None else f"{name}:{first}"
        body = f'{{"model": "{shown}", "messages": [{{"role": "user", "content": "…"}}]{asked}}}'
        output.say(f"next: curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
        output.say("Ctrl-C ends it")
        server.wait()
    output.say("ended")


def _say_waiting(stage: str) -> None:
    output.say(f"waiting: {stage}")
