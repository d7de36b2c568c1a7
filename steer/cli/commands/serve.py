"""`steer serve`: start vLLM with the steering plugin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.cli import options, output, requests
from steer.cli.output import out
from vectors.errors import ExpressionError, SteerError, UsageError, collecting, raise_together
from vectors.language.markers import OPTION as MARKERS
from vectors.language.markers import markers_in
from vectors.registry.layers import parse_layers
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.experiments.specification import Experiment
    from steer.serving.launch import Server


@dataclass(frozen=True, kw_only=True)
class Request(options.Bindings, options.AnyBase, options.AllowStrength):
    """The arguments and options of `steer serve`."""

    model: str = option(
        help="The model to serve: " + options.A_MODEL + " Or a version of a personality, with its base.", argument=True,
        complete="models",
    )  # fmt: skip
    challenger: tuple[str, ...] = option(
        (), help="Another version of a personality, as an arm beside it; may be given several times.", metavar="VERSION"
    )
    arms: Mapping[str, str] = option(
        {},
        help="An arm: requests for the model MODEL:NAME are steered by EXPRESSION.",
        flag="--arm",
        metavar="NAME=EXPRESSION",
    )
    host: str = option("127.0.0.1", help="The address to listen on.")
    port: int = option(8000, help="The port to listen on.", low=1, high=65535)
    steer_rows: int = option(
        256,
        help="How many compositions can be in use at once; one with scopes counts once per phase.",
        low=1,
        high=65535,
    )
    steer_directions: int = option(
        4, help="The most projections (ablate, clamp) of one composition at one layer.", low=0, high=64
    )
    steer_phases: int = option(
        8,
        help="The most phases of one composition; in all phases together, it may have 16 times as many terms.",
        low=1,
        high=512,
    )
    steer_steps: int | None = option(
        None,
        help="The most steps of one composition at one layer: rotations, shares (name%p) and the terms behind a "
        "rotation; 0 allows none, and costs nothing.",
        low=0,
        high=16,
        default_text="what the given arms need",
    )
    steer_gates: int | None = option(
        None,
        help="The most conditions (@when:, @while:, @answer, @thinking, @outside-tools) of one composition; 0 allows "
        "none, and costs nothing.",
        low=0,
        high=4,
        default_text="2 where a probe or an arm with a condition is given, else 0",
    )
    steer_gate_layers: str | None = option(
        None,
        help="The layers that conditions can read: all, or a list such as 12,15.",
        default_text="those that the given probes and the conditions of arms read; without these, all, or none where "
        "arms have sections alone",
    )
    steer_markers: tuple[str, ...] = option((), **MARKERS)
    max_body: int | None = option(
        None,
        help="The most bytes of a request's body, such as 64MiB for images in base64.",
        parse=options.size,
        metavar="SIZE",
        default_text="32 bytes for each token of the model's context, at least 1MiB; for images or audio, 64MiB",
    )
    folders: tuple[Path, ...] = option(
        (), help="A folder that POST /steer/vectors may load from; may be given several times.", flag="--vector-folder"
    )
    experiments: tuple[Path, ...] = option(
        (), help="The file of an A/B experiment, which clients call as a model; may be given several times.",
        flag="--experiment",
    )  # fmt: skip
    api_key_file: Path | None = option(
        None,
        help="A file with the keys that requests must carry, one a line.",
        default_text="the key in STEER_API_KEY or VLLM_API_KEY; without one, no key is asked for",
    )
    api_key: tuple[str, ...] = option(
        (), help="The key that requests must carry. Lists of processes show it: prefer --api-key-file.", metavar="KEY"
    )
    log: Path | None = option(None, help="The file for vLLM's output.", default_text="a temporary file")


@options.command(
    "serve",
    summary="Serve a model with vLLM, steered per request.",
    examples="""
    steer serve smollm2 --vector warm=warm.safetensors
    steer serve smollm2 --vector warm=w.safetensors --vector formal=f.safetensors --arm friendly='1.2*warm - 0.4*formal'
    steer serve smollm2 --experiment tone.yaml
    steer serve tone@champion --challenger tone@challenger
    steer serve org/name --vector warm=warm.safetensors --port 8001 --api-key-file key.txt -- --max-model-len 4096
    """,
)
@requests.takes(Request)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_FLAGS]")
def command(flags: tuple[str, ...], **values: Any) -> None:
    """Serve a model with vLLM, steered per request.

    A request names an arm as its model (MODEL:NAME), or has an expression in vllm_xargs: {"steer": "0.8*warm"}.
    Everything after -- is passed to `vllm serve` unchanged. A name in an arm is given by --vector, or is a version of
    the store ('tone@champion', in quotes), or stands for NAME.safetensors in the current folder.
    """
    request, followed = _with_versions(_with_files(requests.build(Request, values)))
    model = request.model
    settings: dict[str, Any] = {
        "vectors": {name: str(path.expanduser().absolute()) for name, path in request.vectors.items()},
        "arms": dict(request.arms),
        "rows": request.steer_rows,
        "directions": request.steer_directions,
        "phases": request.steer_phases,
        **({} if request.max_body is None else {"max_body": request.max_body}),
        **({} if request.steer_steps is None else {"steps": request.steer_steps}),
        **({} if request.steer_gates is None else {"gates": request.steer_gates}),
        **(
            {}
            if request.steer_gate_layers is None
            else {"gate_layers": parse_layers(request.steer_gate_layers) or "all"}
        ),
        **({"markers": markers_in(request.steer_markers)} if request.steer_markers else {}),
        "folders": [str(folder.expanduser().absolute()) for folder in request.folders],
        "experiments": {},
        "versions": followed,
        "any_base": request.any_base,
        "allow_strength": request.allow_strength,
    }
    from probes.models import markers
    from steer.serving import keys, launch, lora
    from steer.serving.engine import admission
    from steer.serving.flags import served_name
    from steer.serving.settings import check
    from vectors import references

    given = keys.api_keys(flags, request.api_key, request.api_key_file, os.environ)
    flags, token = keys.hub_token(given.flags)
    if given.visible:
        out.warn(f"lists of processes show the API key, since it is an argument; {keys.INSTEAD}")
    if token is not None:
        out.warn("lists of processes show the token of the hub, since it is an argument; set HF_TOKEN")
    output.say_preparing(model)
    source = references.resolve(model)
    identity = references.identity(source)
    # Problems of vectors and arms are reported here, before vLLM spends a minute on its start.
    experiments = _experiments(request)
    settings["experiments"] = {str(e.file.absolute()): e.digest for e in experiments}
    checked = check(settings, Path.cwd())
    flags = (*flags, *lora.lora_flags(experiments, flags, on_cpu=launch.cpu_build()))
    # Which sections the model's markers tell is known when vLLM has read its tokenizer.
    admission.Admission(checked, identity["hidden_size"], identity["layers"], identity, markers=markers.UNREAD)
    name = served_name(flags) or source.name or model
    out.say(f"model {source}")
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.ExitStack() as stack,
    ):  # Ctrl-C ends the server, and is no error
        with out.progress() as on_event:
            server = stack.enter_context(
                launch.served(
                    source.path, settings, name=name, host=request.host, port=request.port,
                    flags=flags, log=request.log, on_event=on_event, api_keys=given.keys,
                    environment={} if token is None else {"HF_TOKEN": token},
                )
            )  # fmt: skip
        arms = {f"{name}:{arm}": str(composition) for arm, composition in checked.arms.items()}
        arms |= {experiment.name: _described(experiment) for experiment in experiments}
        vector = next(iter(checked.vectors), "NAME")
        out.result(
            {"url": server.url, "socket": server.address.path, "log": str(server.log), "model": name, "arms": arms},
            lambda: _say_ready(server, name, arms, vector),
        )
        try:
            server.wait()
        except SystemExit as ended:  # SIGTERM also ends the server, and is no error
            raise SystemExit(ended.code) from None
    out.say("the server has ended")


def _with_versions(request: Request) -> tuple[Request, dict[str, dict[str, str]]]:
    """A request with the versions that it names as arms, over the vectors in the store, and the arms that follow one.

    An arm follows an alias: when the alias moves, new conversations get the version that it moved to. The arm of a
    version is called as its alias, tag or branch: `tone@champion` is the arm champion. Raises UsageError for a
    challenger that is no version, for versions of different bases, and for two arms of one name.
    """
    from dataclasses import replace

    from steer.cli import versions
    from steer.store import layout, names
    from steer.store.using import resolver

    named = [text for text in (request.model,) if versions.is_version(text)] + list(request.challenger)
    if not named:
        return request, {}
    if len(named) == len(request.challenger):
        raise UsageError(f"--challenger needs a version as the model, not {request.model}", "steer serve tone@champion")
    store, followed = layout.require(), dict[str, dict[str, str]]()
    found = {text: resolver.version_of(store, text) for text in named}
    bases = {each.base for each in found.values()}
    if len(bases) > 1:
        raise UsageError(f"the versions have different bases: {', '.join(sorted(bases))}", "serve one base")
    arms, vectors = dict(request.arms), dict(request.vectors)
    for text, each in found.items():
        if each.label in arms:
            raise UsageError(f"two arms are called {each.label}", "leave out one, or give one of them a tag")
        arms[each.label] = str(each.composition)
        vectors |= each.files
        ref = names.ref_of(store, text)
        says = f"{text} is the version {each.commit[7:15]}, as the arm {each.label}"
        if ref is not None and ref.kind == "alias":
            followed[each.label] = resolver.followed(store, str(ref), each)
            says += "; when the alias moves, new conversations get the version that it moved to"
        out.say(says)
    return replace(request, model=bases.pop(), arms=arms, vectors=vectors, challenger=()), followed


def _with_files(request: Request) -> Request:
    """A request whose arms name vectors alone, each with a file: a version is replaced by what it stands for.

    A name that no --vector binds stands for NAME.safetensors in the current folder.
    """
    from dataclasses import replace

    from vectors.resolve import expand, file_of

    arms, vectors = dict(request.arms), dict(request.vectors)
    for arm, text in request.arms.items():
        try:
            composition, files = expand(text, request.vectors)
        except ExpressionError:  # reported with the other problems of the settings
            continue
        names = [n for n in (*composition.names, *composition.probes) if n not in request.vectors]
        arms[arm] = str(composition)
        vectors |= files | {name: file for name in names if (file := file_of(name)) is not None}
    return replace(request, arms=arms, vectors=vectors)


def _experiments(request: Request) -> list[Experiment]:
    """The experiments to run, compared with the model. Raises SteerError, also where a log can't be opened."""
    if not request.experiments:
        return []
    import importlib.util

    if importlib.util.find_spec("sqlalchemy") is None:
        raise UsageError("experiments need SQLAlchemy, which is not installed", "pip install 'steer-workbench[ab]'")
    from steer.experiments import assignment, document
    from steer.experiments.running.questions import require_keys
    from steer.experiments.storage.database import open_log

    errors: list[SteerError] = []
    experiments = []
    for file in request.experiments:
        with collecting(errors):
            experiments.append(document.read(document.find(str(file)), model=request.model))
            document.require_salt(experiments[-1])
            require_keys(experiments[-1])
            open_log(experiments[-1].log).dispose()
    with collecting(errors):
        assignment.require_apart(experiments)
    raise_together(errors)
    return experiments


def _described(experiment: Experiment) -> str:
    steps = " -> ".join(f"{step:.4g}" for step in experiment.steps)
    arms = ", ".join(f"{arm.name} ({arm.weight:.3g})" for arm in experiment.arms)
    return f"experiment {experiment.digest[:19]}: {arms}; coverage {steps}"


def _say_ready(server: Server, name: str, arms: Mapping[str, str], vector: str) -> None:
    out.say(f"serving at {server.address}; vLLM's output is in {server.log}")
    for arm, composition in arms.items():
        out.say(f"  {arm}  {composition}")
    first = next(iter(arms), None)
    steer = f', "vllm_xargs": {{"steer": "{vector}"}}' if first is None else ""
    body = f'{{"model": "{first or name}", "messages": [{{"role": "user", "content": "…"}}]{steer}}}'
    to = f"--unix-socket {server.address.path} {server.url}" if server.address.path else server.url
    out.say(f"next: curl {to}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    out.say("Ctrl-C ends the server")
