"""What a server is started with: vectors, arms, the size of the slot table, and the folders to load vectors from.

`steer serve` writes these settings to a file and sets STEER_CONFIG to its path; in an existing deployment you write the
file yourself:

    vectors: {warm: warm.safetensors, anger: anger-probe.safetensors}   # or probes; relative to this file
    arms: {friendly: 1.2*warm - 0.4*formal}
    rows: 256          # slots: how many compositions can be in use at once; one with scopes takes a slot per phase
    directions: 4      # most projections (ablate, clamp) of one composition at one layer
    steps: 2           # most rotations, shares (name%p) and terms behind a rotation; by default what the arms need
    gates: 2           # most conditions of one composition; 0 (no conditions) unless a probe or a condition is given
    gate_layers: [12]  # where conditions can read, or all; by default where given probes and conditions of arms read
    markers: {thinking: [<think>, </think>]}  # texts that begin and end thinking, tools; by default known ones
    phases: 8          # most phases of one composition; in all of them together, it may have 16 times as many terms
    max_body: 1048576  # most bytes of the body of a request to vLLM's routes; by default what the model's context needs
    experiments: {tone.yaml: null}  # files of experiments, each with the digest that it must have (null: any)
    versions: {champion: {name: tone@champion, store: /home/ana/tone/.steer, work: /home/ana/tone, base: smollm2,
               commit: "sha256:…"}}    # arms that follow an alias; `steer serve tone@champion` writes this
    folders: [vectors]     # where POST /steer/vectors may load from; none by default
    any_base: false    # true allows vectors of other models of the same size
    allow_strength: false  # true allows strengths beyond twenty times the recommended one
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer.experiments import assignment, document
from steer.experiments.running import readouts
from steer.experiments.specification import Experiment
from vectors.documents import yaml_text
from vectors.documents.json_text import read_bounded
from vectors.documents.schema import mapping_of, problems_of, strict
from vectors.documents.schema import text as a_text
from vectors.errors import SteerError, UsageError, collecting
from vectors.expression import Composition, parse
from vectors.probe import Probe, is_probe, reading_of
from vectors.steering import SteeringVector

NAME = "steer"  # the plugin's name, in VLLM_PLUGINS and in vLLM's configuration
CONFIG = "STEER_CONFIG"
ROWS, DIRECTIONS, PHASES = 256, 4, 8
MOST_PHASES = 512
GATES, MOST_GATES = 2, 4
MOST_STEPS = 16
_SIZES = {
    "rows": (ROWS, 1, 65_535),
    "directions": (DIRECTIONS, 0, 65_535),
    "phases": (PHASES, 1, MOST_PHASES),
    "steps": (None, 0, MOST_STEPS),
    "gates": (None, 0, MOST_GATES),
    "max_body": (None, 1, 2**40),
}
_VERSIONS = mapping_of(strict(dict.fromkeys(("name", "store", "work", "base", "commit"), a_text(longest=4096))))


@dataclass(frozen=True)
class Settings:
    """Validated settings: the vectors and probes of all files, and the parsed expression of every arm.

    `gate_layers` None is all layers, () none.
    """

    vectors: Mapping[str, SteeringVector] = field(default_factory=dict)
    arms: Mapping[str, Composition] = field(default_factory=dict)
    rows: int = ROWS
    directions: int = DIRECTIONS
    phases: int = PHASES
    max_body: int | None = None  # bytes; None for the default of the served model
    experiments: tuple[Experiment, ...] = ()
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    any_base: bool = False
    allow_strength: bool = False
    probes: Mapping[str, Probe] = field(default_factory=dict)
    steps: int = 0
    gates: int = 0
    gate_layers: tuple[int, ...] | None = None
    markers: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def graph(self) -> dict[str, Any]:
        """The settings that the compiled graph depends on, for vLLM's cache key."""
        graph: dict[str, Any] = {"rows": self.rows, "directions": self.directions}
        if self.steps:
            graph |= {"steps": self.steps}
        if self.gates:
            graph |= {"gates": self.gates, "gate_layers": None if self.gate_layers is None else list(self.gate_layers)}
        return graph


def from_environment() -> Settings:
    """The settings in the file that STEER_CONFIG names; the defaults where it is not set. Raises UsageError."""
    file = os.environ.get(CONFIG)
    return read(Path(file)) if file else Settings()


def read(file: Path) -> Settings:
    """Read and check a settings file. Raises UsageError with every problem."""
    try:
        values = yaml_text.parse(read_bounded(file, yaml_text.LARGEST).decode("utf-8-sig")) or {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UsageError(f"the settings {file} can't be read: {reason}", f"check {CONFIG}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the settings {file} are not a mapping", "write vectors: {warm: warm.safetensors}")
    return check(values, file.parent)


def check(values: Mapping[str, Any], folder: Path) -> Settings:
    """Settings from the values of a YAML file; paths are relative to `folder`. Raises UsageError with every problem."""
    problems: list[str] = []
    hints: list[str] = []
    switches = ("any_base", "allow_strength")
    known = ("vectors", "arms", *_SIZES, "gate_layers", "markers", "experiments", "versions", "folders", *switches)
    problems += [f"the settings have no {key!r}" for key in values if key not in known]
    vectors, probes = _vectors(values.get("vectors") or {}, folder, problems, hints)
    experiments = _experiments(values.get("experiments") or {}, folder, vectors, probes, problems, hints)
    arms = _arms(values.get("arms") or {}, {**vectors, **probes}, values.get("vectors") or {}, problems, hints)
    sizes = {name: values.get(name, default) for name, (default, _, _) in _SIZES.items()}
    for name, (default, low, high) in _SIZES.items():
        size = sizes[name]
        if size is None and default is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not low <= size <= high:
            problems.append(f"{name} is {size!r}, not a whole number from {low} to {high}")
    gate_layers = values.get("gate_layers")
    if gate_layers not in (None, "all") and not (
        isinstance(gate_layers, list) and gate_layers and all(type(i) is int and i >= 0 for i in gate_layers)
    ):
        problems.append(f"gate_layers is {gate_layers!r}, not all or a list of layers")
    markers = values.get("markers") or {}
    if not isinstance(markers, dict) or not all(
        kind in ("thinking", "tools")
        and isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        and pair[0]
        for kind, pair in markers.items()
    ):
        problems.append(f"markers is {markers!r}, not thinking and tools, each with [BEGIN, END]")
        markers = {}
    folders = values.get("folders") or []
    if not isinstance(folders, list) or not all(isinstance(name, str) for name in folders):
        problems.append(f"folders is {folders!r}, not a list of paths")
        folders = []
    paths = [folder / os.path.expanduser(name) for name in folders]
    for path in paths:
        if not os.path.isdir(path):
            problems.append(f"the folder {path} does not exist")
            hints.append("vectors can only be loaded from folders that exist")
    problems += [
        f"{name} is {values[name]!r}, not true or false"
        for name in switches
        if not isinstance(values.get(name, False), bool)
    ]
    versions = values.get("versions") or {}
    problems += [f"versions: {problem}" for problem in problems_of(versions, _VERSIONS)]
    if isinstance(versions, dict):
        problems += [f"versions names {arm!r}, which is no arm" for arm in versions if arm not in arms]
    if problems:
        raise UsageError(problems, "; ".join(dict.fromkeys(hints)) or f"the settings are {', '.join(known)}")
    compositions = [
        *arms.values(),
        *(composition for each in experiments for composition in readouts.compositions(each).values()),
    ]
    if sizes["steps"] is None:
        sizes["steps"] = min(MOST_STEPS, max((len(each.steps) for each in compositions), default=0))
    if sizes["gates"] is None:
        sizes["gates"] = GATES if probes or any(each.conditions for each in compositions) else 0
    if gate_layers is None:
        # With sections alone nothing is read, unless gates are wanted for more.
        only_sections = values.get("gates") is None and not probes
        gate_layers = _layers_read({**vectors, **probes}, probes, compositions) or ([] if only_sections else "all")
    return Settings(
        vectors,
        arms,
        probes=probes,
        markers={kind: (pair[0], pair[1]) for kind, pair in markers.items()},
        gate_layers=tuple(sorted(set(gate_layers))) if sizes["gates"] and isinstance(gate_layers, list) else None,
        **sizes,
        experiments=experiments,
        versions=versions,
        folders=tuple(paths),
        **{name: bool(values.get(name)) for name in switches},
    )


def _vectors(
    values: Any, folder: Path, problems: list[str], hints: list[str]
) -> tuple[dict[str, SteeringVector], dict[str, Probe]]:
    """The vectors and the probes by name."""
    vectors: dict[str, SteeringVector] = {}
    probes: dict[str, Probe] = {}
    if not isinstance(values, dict):
        problems.append(f"vectors is {values!r}, not a mapping from names to files")
        return vectors, probes
    for name, file in values.items():
        try:
            if not isinstance(name, str) or not isinstance(file, str):
                raise UsageError(f"the vector {name!r}: {file!r} is not a name and a file", "write warm: FILE")
            check_name(name)
            path = folder / os.path.expanduser(file)
            if is_probe(path):
                probes[name] = Probe.load(path)
            else:
                vectors[name] = SteeringVector.load(path)
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
    return vectors, probes


def _experiments(
    values: Any,
    folder: Path,
    vectors: dict[str, SteeringVector],
    probes: dict[str, Probe],
    problems: list[str],
    hints: list[str],
) -> tuple[Experiment, ...]:
    """The experiments of the settings; what their arms add and read is added to `vectors` and `probes`."""
    if not isinstance(values, dict) or not all(isinstance(file, str) for file in values):
        problems.append(f"experiments is {values!r}, not a mapping from files to digests")
        return ()
    experiments: dict[str, Experiment] = {}
    errors: list[SteerError] = []
    for file, digest in values.items():
        try:
            experiment = document.read(folder / os.path.expanduser(file))
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
            continue
        if digest is not None and digest != experiment.digest:
            problems.append(f"the experiment {experiment.name} has changed: it is {experiment.digest}, not {digest}")
            hints.append("start the server again")
        if experiment.name in experiments:
            problems.append(f"two experiments are called {experiment.name}")
        with collecting(errors):
            document.require_salt(experiment)
        experiments[experiment.name] = experiment
        for name, source in readouts.sources(experiment).items():
            known = vectors.get(name) or probes.get(name)
            if known is not None and known.digest != source.digest:
                problems.append(f"the experiment {experiment.name} has another vector {name} than --vector or an arm")
                hints.append("give one of them another name")
            if isinstance(source, Probe):
                probes[name] = source
            else:
                vectors[name] = source
    taking = [experiment.name for experiment in experiments.values() if experiment.clients_call == "model"]
    if len(taking) > 1:
        problems.append(f"the experiments {', '.join(taking)} all take the requests for the model")
        hints.append("write clients_call: experiment in all but one")
    with collecting(errors):
        assignment.require_apart(tuple(experiments.values()))
    problems += [problem for error in errors for problem in error.problems]
    hints += [error.hint for error in errors]
    return tuple(experiments.values())


def _arms(
    values: Any, vectors: Mapping[str, SteeringVector | Probe], named: Any, problems: list[str], hints: list[str]
) -> dict[str, Composition]:
    if not isinstance(values, dict):
        problems.append(f"arms is {values!r}, not a mapping from names to expressions")
        return {}
    arms = {}
    for name, text in values.items():
        try:
            if not isinstance(name, str) or not isinstance(text, str):
                raise UsageError(
                    f"the arm {name!r}: {text!r} is not a name and an expression", "write friendly: 1.2*warm"
                )
            arms[name] = read_arm(name, text)
        except SteerError as error:
            problems += [f"arm {name!r}: {problem}" for problem in error.problems]
            hints.append(error.hint)
            continue
        missing = [each for each in (*arms[name].names, *arms[name].probes) if each not in vectors]
        # A vector whose file could not be read has been reported already.
        missing = [vector for vector in missing if not isinstance(named, dict) or vector not in named]
        if missing:
            problems.append(f"arm {name!r} uses {', '.join(missing)}, but no vector has that name")
            hints.append(f"give it: --vector {missing[0]}=FILE")
    return arms


def _layers_read(
    sources: Mapping[str, SteeringVector | Probe], probes: Iterable[str], arms: Iterable[Composition]
) -> list[int]:
    """The layers that the probes read by default, and those that the conditions of arms read."""
    layers = [reading_of(sources[name])[0] for name in probes]
    for condition in (each for arm in arms for each in arm.conditions if not each.is_section):
        source = sources[condition.name]
        if condition.layer is None or condition.layer in source.layers:  # else the arm is refused with the others
            layers.append(reading_of(source, condition.layer)[0])
    return layers


def adapter_name(experiment: str, arm: str) -> str:
    """The name under which the adapter of an experiment's arm is served."""
    return f"{experiment}.{arm}"


def read_arm(name: str, text: str) -> Composition:
    """The composition of an arm. Raises SteerError for a name that can't be part of a model's, or a path's, name."""
    if (
        not name
        or any(c in name for c in " /:\\\"'")
        or not name.isprintable()
        or name in (".", "..")
        or len(name) > 200
    ):
        raise UsageError(f"the arm {name[:210]!r} can't be part of a model's name", "use letters, digits, - and _")
    return parse(text)


def check_name(name: str) -> None:
    """Refuse a name that an expression could not quote. Raises UsageError."""
    if not name or not name.isprintable() or ("'" in name and '"' in name) or len(name) > 200:
        raise UsageError(f"{name!r} can't be the name of a vector", "use letters, digits, - and _")
