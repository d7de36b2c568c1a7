"""The arms of an experiment's document, with the vectors and adapters that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steer.experiments.specification import Arm
from steer.store import layout, names
from steer.store.using.resolver import resolver
from vectors import fit
from vectors.errors import SteerError
from vectors.probe import Probe
from vectors.resolve import Resolver, compose_gated, folder_resolver
from vectors.steering import SteeringVector
from vectors.storage.files import digest_file, digest_json

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # the files of a LoRA adapter in PEFT's form
BIND = "bind it in the file: vectors: {{name}: FILE}"
_BIND = re.compile(re.escape(BIND).replace(r"\{name\}", "(.+)"))
_VERSION = re.compile(r"'([^']*[@:~][^']*)'")  # a quoted name that no vector has: a version of the store


class Arms(NamedTuple):
    """The arms of a document, the vectors that their terms add and what their conditions read, by name; problems and
    hints."""

    arms: tuple[Arm, ...]
    vectors: dict[str, SteeringVector]
    probes: dict[str, Probe | SteeringVector]
    problems: list[str]
    hints: list[str]


def arms_of(values: Mapping[str, Any], folder: Path, resolvers: Sequence[Resolver] | None) -> Arms:
    """The arms of a document whose fields have the right types."""
    bindings = {name: folder / os.path.expanduser(path) for name, path in (values.get("vectors") or {}).items()}
    searched = [resolver(folder), folder_resolver(folder)] if resolvers is None else resolvers
    arms: list[Arm] = []
    vectors: dict[str, SteeringVector] = {}
    probes: dict[str, Probe | SteeringVector] = {}
    problems: list[str] = []
    hints: list[str] = []
    given = values["arms"]
    for name, arm in given.items():
        arm = {key: value for key, value in (arm or {}).items() if value not in (None, "")}
        weight = arm.get("weight", 1 / len(given))
        weight = float(weight.strip(" %")) / 100 if isinstance(weight, str) else float(weight)
        expression, digests, adapter, commit = "", {}, "", ""
        try:
            if "steer" in arm:
                composition, named, read = compose_gated(arm["steer"], bindings, resolvers=searched, bind=BIND)
                expression = str(composition)
                digests = {key: source.digest for key, source in {**named, **read}.items()}
                vectors |= named
                probes |= read
                commit = "" if resolvers is not None else commit_of(arm["steer"], folder, bindings)
        except SteerError as error:
            missing = _VERSION.search(arm["steer"]) if resolvers is None and layout.find(folder) is None else None
            if missing is not None and missing[1] not in bindings:
                problems.append(f"arm {name}: there is no store beside the file, so {missing[1]!r} names no version")
                hints.append("make a store: steer init")
            else:
                problems += [f"arm {name}: {problem}" for problem in error.problems]
                hints.append(error.hint)
        if "lora" in arm:
            try:
                adapter = adapter_digest(folder / os.path.expanduser(arm["lora"]))
            except OSError as error:
                problems.append(f"arm {name}: the adapter {arm['lora']} can't be read: {error.strerror}")
                hints.append(f"an adapter is a folder with {' and '.join(ADAPTER)}")
        lora = str((folder / os.path.expanduser(arm["lora"])).absolute()) if "lora" in arm else ""
        arms.append(
            Arm(name, weight, expression, digests, lora, adapter, arm.get("system", ""), arm.get("steer", ""), commit)
        )
    if len(given) < 2:
        problems.append(f"an experiment compares at least two arms, and this one has {len(given)}")
    plain = plain_arms(given)
    if len(plain) != 1:
        problems.append(
            f"exactly one arm must be the control, with neither steer, lora nor system; there are {len(plain)}"
            + (f": {', '.join(plain)}" if plain else "")
        )
        hints.append("write control: {}")
    return Arms(tuple(arms), vectors, probes, problems, _joined(hints))


def _joined(hints: Sequence[str]) -> list[str]:
    """Hints, those about names that are not bound as one."""
    unbound = [match[1] for hint in hints if (match := _BIND.fullmatch(hint))]
    others = [hint for hint in hints if not _BIND.fullmatch(hint)]
    named = ", ".join(f"{name}: FILE" for name in dict.fromkeys(unbound))
    several = "them" if len(set(unbound)) > 1 else "it"
    return [f"bind {several} in the file: vectors: {{{named}}}", *others] if unbound else others


def plain_arms(arms: Mapping[str, Any]) -> list[str]:
    """The names of the arms of a file that change nothing."""
    return [name for name, arm in arms.items() if not any((arm or {}).get(key) for key in ("steer", "lora", "system"))]


def alike(arms: Sequence[Arm]) -> list[list[str]]:
    """The names of arms that do the same, in the order of the arms."""
    by_digest: dict[str, list[str]] = {}
    for arm in arms:
        by_digest.setdefault(arm.digest, []).append(arm.name)
    return [names for names in by_digest.values() if len(names) > 1]


def commit_of(text: str, folder: Path, bindings: Mapping[str, Any]) -> str:
    """The commit of the version of the store that an expression is; empty where it is anything else."""
    name = text.strip().strip("'\"")
    store = layout.find(folder)
    return "" if store is None or name in bindings else names.find(store, name) or ""


def adapter_digest(folder: Path) -> str:
    """The digest of a LoRA adapter: of the digests of its two files. Raises OSError."""
    return digest_json({name: digest_file(folder / name) for name in ADAPTER})


def problems_of_model(
    arms: Arms, judges: Mapping[str, Probe], reference: str | None, served: str | None, named: str | None
) -> list[str]:
    """Why the vectors of arms can't steer the model, or their probes and those of judges, by name, not read it.

    `served` is the model that a server loads, `named` the file's.
    """
    from vectors import references

    problems = []
    sources = {**{f"of the judge {name}": probe for name, probe in judges.items()}, **arms.probes, **arms.vectors}
    if reference is None:
        return problems_between(sources)
    try:
        source_of_model = references.resolve(reference)
        identity = references.identified(source_of_model, references.identity(source_of_model))
        if served is not None and named is not None and served != named:
            other = references.identity(references.resolve(named))
            if other["digest"] != identity["digest"]:
                return [f"the experiment is about the model {named}, not {served}"]
    except SteerError as error:
        return list(error.problems)
    model: dict[str, Any] = {"hidden_size": identity["hidden_size"], "layers": identity["layers"], "base": identity}
    for name, source in sources.items():
        if isinstance(source, Probe):
            problems += fit.problems_of_probe(name, source, **model)
        else:
            problems += fit.problems_of(name, source, **model)
    return problems


def problems_between(sources: Mapping[str, SteeringVector | Probe]) -> list[str]:
    """A problem when vectors and probes belong to different models, where it is not known which one will be served."""
    bases = {name: source.base.get("digest") for name, source in sources.items() if source.base.get("digest")}
    if len(set(bases.values())) < 2:
        return []
    names = {name: sources[name].base.get("name", digest) for name, digest in bases.items()}
    return ["the vectors belong to different models: " + ", ".join(f"{name} to {base}" for name, base in names.items())]
