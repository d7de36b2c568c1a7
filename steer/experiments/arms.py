"""The arms of an experiment's document, with the vectors and adapters that they name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.experiments.specification import Arm
from steer.store import layout, names
from steer.store.using.resolver import resolver
from vectors import fit
from vectors.errors import SteerError
from vectors.resolve import Resolver, compose, folder_resolver
from vectors.steering import SteeringVector
from vectors.storage.files import digest_file, digest_json

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # the files of a LoRA adapter in PEFT's form


def arms_of(
    values: Mapping[str, Any], folder: Path, resolvers: Sequence[Resolver] | None
) -> tuple[tuple[Arm, ...], dict[str, SteeringVector], list[str], list[str]]:
    """(arms, vectors by name, problems, hints) of a document whose fields have the right types."""
    bindings = {name: folder / os.path.expanduser(path) for name, path in (values.get("vectors") or {}).items()}
    searched = [resolver(folder), folder_resolver(folder)] if resolvers is None else resolvers
    arms: list[Arm] = []
    vectors: dict[str, SteeringVector] = {}
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
                composition, named = compose(arm["steer"], bindings, resolvers=searched)
                expression, digests = str(composition), {key: vector.digest for key, vector in named.items()}
                vectors |= named
                commit = "" if resolvers is not None else commit_of(arm["steer"], folder, bindings)
        except SteerError as error:
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
    plain = [
        name for name, arm in given.items() if not any((arm or {}).get(key) for key in ("steer", "lora", "system"))
    ]
    if len(plain) != 1:
        problems.append(
            f"exactly one arm must be the control, with neither steer, lora nor system; there are {len(plain)}"
            + (f": {', '.join(plain)}" if plain else "")
        )
        hints.append("write control: {}")
    return tuple(arms), vectors, problems, hints


def commit_of(text: str, folder: Path, bindings: Mapping[str, Any]) -> str:
    """The commit of the version of the store that an expression is; empty where it is anything else."""
    name = text.strip().strip("'\"")
    store = layout.find(folder)
    return "" if store is None or name in bindings else names.find(store, name) or ""


def adapter_digest(folder: Path) -> str:
    """The digest of a LoRA adapter: of the digests of its two files. Raises OSError."""
    return digest_json({name: digest_file(folder / name) for name in ADAPTER})


def problems_of_model(
    vectors: Mapping[str, SteeringVector], reference: str | None, served: str | None, named: str | None
) -> list[str]:
    """Why these vectors can't steer the model; `served` is the one that a server loads, `named` the file's."""
    from vectors import references

    problems = []
    if reference is None:
        return problems_between(vectors)
    try:
        identity = references.identity(references.resolve(reference))
        if served is not None and named is not None and served != named:
            other = references.identity(references.resolve(named))
            if other["digest"] != identity["digest"]:
                return [f"the experiment is about the model {named}, not {served}"]
    except SteerError as error:
        return list(error.problems)
    for name, vector in vectors.items():
        problems += fit.problems_of(
            name, vector, hidden_size=identity["hidden_size"], layers=identity["layers"], base=identity
        )
    return problems


def problems_between(vectors: Mapping[str, SteeringVector]) -> list[str]:
    """A problem when vectors belong to different models, where it is not known which one will be served."""
    bases = {name: vector.base.get("digest") for name, vector in vectors.items() if vector.base.get("digest")}
    if len(set(bases.values())) < 2:
        return []
    names = {name: vectors[name].base.get("name", digest) for name, digest in bases.items()}
    return ["the vectors belong to different models: " + ", ".join(f"{name} to {base}" for name, base in names.items())]
