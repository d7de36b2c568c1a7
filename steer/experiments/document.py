"""The file of an experiment, read and checked: all problems at once, also those of the vectors that its arms name.

    name: tone
    salt: tone-5d1f…
    arms:
      control: {}
      friendly: {steer: 1.2*warm}
    metric: {name: thumbs, smallest_effect: 0.05}

`template` writes one with every key explained.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steer.evaluation.judging.endpoint import problems_of_url
from steer.experiments.arms import Arms, arms_of, plain_arms, problems_of_model
from steer.experiments.specification import (
    CALLED,
    DIRECTIONS,
    GUARDRAILS,
    KINDS,
    METHODS,
    ON_BREACH,
    PER,
    RATIOS,
    SERVER_METRICS,
    UNITS,
    Allocation,
    Experiment,
    Judge,
    Metric,
    Namespace,
)  # fmt: skip
from vectors.documents import schema, yaml_text
from vectors.documents.json_text import read_bounded
from vectors.errors import SteerError, UsageError, guess
from vectors.probe import Probe
from vectors.resolve import Resolver

_EVERY_KEY = "steer ab init writes a file with every key explained"
LEAST_SHARE = 0.0001  # of an arm with adaptive weights, which have four decimals
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_NAME = schema.text(NAME, "a name of letters, digits, _, . and -, of at most 64 characters")
_LINE = schema.text(r"[^\0]{0,4096}", "text of at most 4096 characters")
_POSTGRESQL = r"^postgres(ql)?(\+\w+)?://"
_TEXTS = ("name", "salt", "steer", "system", "lora", "model", "log", "url", "header", "instruction", "key_variable")


def known(required: Mapping[str, schema.Check], optional: Mapping[str, schema.Check]) -> schema.Check:
    """A `schema.record` in which other fields are problems: a misspelt one would be ignored."""
    inner = schema.record(required, {key: schema.optional(check) for key, check in optional.items()})

    def check(value: Any, name: str) -> Iterator[str]:
        yield from inner(value, name)
        names = [*required, *optional]
        for key in value if isinstance(value, Mapping) else ():
            if key not in names:
                where = f"{name} has" if name else "the experiment has"
                yield f"{where} no {schema.excerpt(key)}{guess(str(key)[:60], names)}"

    return check


def _limit_of_ratio(value: Any, name: str) -> Iterator[str]:
    yield from schema.positive(value, name)
    if isinstance(value, int | float) and 0 < value < 1:
        yield f"{name} is {schema.excerpt(value)}, below 1: an arm that is like the control would be outside of it"


def _limit_of_share(value: Any, name: str) -> Iterator[str]:
    yield from schema.positive(value, name)
    if isinstance(value, int | float) and value > 1:
        yield f"{name} is {schema.excerpt(value)}, and no share exceeds another by more than 1"


def _log(value: Any, name: str) -> Iterator[str]:
    yield from _LINE(value, name)
    scheme = re.match(r"(\w[\w+.-]*)://", value) if isinstance(value, str) else None
    if scheme and scheme[1] != "sqlite" and not re.match(_POSTGRESQL, value):
        yield f"{name} is a URL of {scheme[1]}://, not the path of a SQLite file, or postgresql://…"


_METRIC = known(
    {"name": _NAME},
    {
        "kind": schema.one_of(*KINDS), "better": schema.one_of(*DIRECTIONS), "smallest_effect": schema.positive,
        "baseline": schema.number, "spread": schema.positive, "low": schema.number, "high": schema.number,
        "per": schema.one_of(*PER),
    },
)  # fmt: skip
_JUDGE = known(
    {"name": _NAME},
    {
        "url": schema.text(r"https?://\S{1,2000}", "a URL"),
        "model": _LINE,
        "instruction": _LINE,
        "scorer": _LINE,
        "sample_rate": schema.share,
        "key_variable": schema.text(r"[A-Za-z_]\w{0,99}", "the name of an environment variable"),
    },
)
_UNIT = schema.either(
    schema.one_of(*UNITS),
    known({"header": schema.text(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", "the name of a header")}, {}),
    wanted="conversation, user, or {header: NAME}",
)
_RANGE = schema.tuple_of(schema.share, schema.share, wanted="a range like [0, 0.5]")
_ARM = known({}, {"steer": _LINE, "lora": _LINE, "system": schema.text(longest=100_000), "weight": schema.share})
EXPERIMENT = known(
    {"name": _NAME, "arms": schema.mapping_of(schema.optional(_ARM), _NAME), "metric": _METRIC},
    {
        "model": _LINE, "vectors": schema.mapping_of(_LINE), "unit": _UNIT, "coverage": schema.share,
        "salt": schema.text(r"[^\0]{1,200}", "text of 1 to 200 characters"),
        "namespace": known({"name": _NAME, "range": _RANGE}, {}),
        "allocation": known(
            {"method": schema.one_of(*METHODS)}, {"smallest_share": schema.share, "every": schema.whole(1, 86_400)}
        ),
        "secondary": schema.list_of(_METRIC, 50),
        "guardrails": known({}, {n: _limit_of_ratio if n in RATIOS else _limit_of_share for n in GUARDRAILS}),
        "judges": schema.list_of(_JUDGE, 20), "ramp": schema.list_of(schema.share, 20),
        "ramp_responses": schema.whole(1, 10**9), "on_breach": schema.one_of(*ON_BREACH),
        "clients_call": schema.one_of(*CALLED), "store_texts": schema.boolean, "log": _log,
    },
)  # fmt: skip


def read(file: Path, *, model: str | None = None, resolvers: Sequence[Resolver] | None = None) -> Experiment:
    """The experiment in a file, with the vectors of its arms. Raises UsageError with every problem.

    `model` is a reference to the model that is to be served; the vectors are compared with it, or with the model that
    the file names. Vectors are looked up in the file's `vectors`, then by `resolvers`, by default in its folder.
    """
    return check(_values(file), file, model=model, resolvers=resolvers)


def require_salt(experiment: Experiment) -> None:
    """Raise UsageError where a file has no salt, so that its name would stand for it.

    The name is in the log, so who reads the log could find the rows of a user whose id they know.
    """
    if experiment.salt == experiment.name:
        raise UsageError(
            f"{experiment.file} has no salt, which keeps the users of an experiment unknown to who reads its log",
            f"add the line: salt: {experiment.name}-{secrets.token_hex(8)}",
        )


def _values(file: Path) -> Any:
    try:
        return yaml_text.parse(read_bounded(file, yaml_text.LARGEST).decode("utf-8-sig"), texts=_TEXTS)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        hint = "make one: steer ab init FILE" if isinstance(error, FileNotFoundError) else _EVERY_KEY
        raise UsageError(f"the experiment {file} can't be read: {reason}", hint) from error


def check(
    values: Any, file: Path, *, model: str | None = None, resolvers: Sequence[Resolver] | None = None
) -> Experiment:
    """The experiment of a document's values; `file` is where it stands. Raises UsageError with every problem."""
    problems = list(itertools.islice(EXPERIMENT(values, ""), 50))
    if not isinstance(values, Mapping):
        raise UsageError(f"the experiment {file} is {schema.excerpt(values)}, not a mapping", "see docs/ab.md")
    values = {key: value for key, value in values.items() if value is not None}
    composed, readouts = Arms((), {}, {}, [], []), dict[str, Probe]()
    given = values.get("arms")
    if isinstance(given, Mapping) and not any(problem.startswith(("arms", "vectors")) for problem in problems):
        composed = arms_of(values, file.parent, resolvers)
        problems += composed.problems
        problems += _problems_of_weights(given)
        problems += _problems_of_allocation(values, given)
        readouts = _readouts(values, file.parent)
        problems += problems_of_model(composed, readouts, model or values.get("model"), model, values.get("model"))
    problems += _problems_between(values, file.parent)
    if problems:
        raise UsageError(
            [f"{file.name}: {problem}" for problem in problems],
            "; ".join(dict.fromkeys(hint for hint in composed.hints if hint)) or _EVERY_KEY,
        )
    return _built(values, file, composed, readouts)


def _problems_of_weights(arms: Mapping[str, Any]) -> list[str]:
    weights = {name: (arm or {}).get("weight") for name, arm in arms.items()}
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) < len(weights):
        without = [name for name, weight in weights.items() if weight is None]
        return [f"the arms {', '.join(without)} have no weight: give one to every arm, or to none"]
    total = sum(schema.share_of(weight) or 0.0 for weight in given)
    if given and abs(total - 1) > 1e-6:
        return [f"the weights of the arms sum to {total:.6g}, not to 1"]
    plain = plain_arms(arms)
    if any(weight is not None and not schema.share_of(weight) for name, weight in weights.items() if name in plain):
        return [f"the control {plain[0]} has the weight 0, so no arm can be compared with it"]
    if given and not any(schema.share_of(weight) for name, weight in weights.items() if name not in plain):
        return ["no arm beside the control has a weight above 0, so nothing is compared with it"]
    return []


def _problems_of_allocation(values: Mapping[str, Any], arms: Mapping[str, Any]) -> list[str]:
    """Why the weights of these arms can't be adapted."""
    if not isinstance(values.get("allocation"), Mapping):
        return []
    problems, metric = [], values.get("metric")
    if isinstance(metric, Mapping) and metric.get("smallest_effect") is None:
        problems.append("allocation needs metric.smallest_effect: arms that differ by less are equally good")
    given = values["allocation"].get("smallest_share")
    smallest = schema.share_of(Allocation.smallest_share if given is None else given)
    if smallest is None:
        return problems
    if smallest < LEAST_SHARE or not smallest * len(arms) < 1:
        return [*problems, f"allocation.smallest_share is {smallest:g}, which {len(arms)} arms can't have each: "
                f"give one from {LEAST_SHARE:g} on and below {1 / max(len(arms), 1):.3g}"]  # fmt: skip
    for name, arm in arms.items():
        weight = schema.share_of((arm or {}).get("weight", 1 / len(arms)))
        if weight is not None and weight < smallest:
            problems.append(f"the arm {name} has the weight {weight:g}, below allocation.smallest_share {smallest:g}")
    return problems


def _readouts(values: Mapping[str, Any], folder: Path) -> dict[str, Probe]:
    """The probes of the judges that are probes, by name; those that can't be read are among the problems."""
    found = {}
    for judge in (each for each in _list(values.get("judges")) if isinstance(each, Mapping)):
        with contextlib.suppress(SteerError):
            if (settings := probe_of(judge.get("scorer"), folder)) is not None:
                found[str(judge.get("name"))] = Probe.load(settings.file)
    return found


def probe_of(scorer: Any, folder: Path) -> Any:
    """The settings of a judge's scorer that is a probe; None for any other. Raises SteerError for a wrong one."""
    from steer.evaluation import scorers

    if not isinstance(scorer, str) or scorer.partition(":")[0] != "probe":
        return None
    return scorers.parse(scorer, folder, "scorer").settings


def _problems_between(values: Mapping[str, Any], folder: Path) -> list[str]:
    """What is wrong between fields that are each possible by themselves."""
    problems = []
    ramp = values.get("ramp") or []
    steps = [schema.share_of(step) for step in ramp] if isinstance(ramp, list) else []
    numbers = [step for step in steps if step is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        problems.append("ramp does not ascend")
    if any(step == 0 for step in numbers):
        problems.append("ramp has a step of 0, at which nobody takes part")
    space = values.get("namespace")
    if isinstance(space, Mapping) and isinstance(space.get("range"), list) and len(space["range"]) == 2:
        start, end = map(schema.share_of, space["range"])
        if start is not None and end is not None and start >= end:
            problems.append("namespace.range is empty: its start is not below its end")
    metrics = [m for m in [values.get("metric"), *_list(values.get("secondary"))] if isinstance(m, Mapping)]
    names = [metric.get("name") for metric in metrics if isinstance(metric.get("name"), str)]
    problems += [f"the metric {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for metric in metrics:
        low, high = metric.get("low"), metric.get("high")
        if isinstance(low, int | float) and isinstance(high, int | float) and low >= high:
            problems.append(f"the metric {metric.get('name')} has low {low:g}, not below high {high:g}")
        if metric.get("name") in SERVER_METRICS and metric.get("kind") == "bool" and metric.get("name") != "refusal":
            problems.append(f"the metric {metric['name']}, which the server computes, is a number")
    problems += [
        problem for j in _list(values.get("judges")) if isinstance(j, Mapping) for problem in _judge(j, folder)
    ]
    judges = [j.get("name") for j in _list(values.get("judges")) if isinstance(j, Mapping)]
    problems += [f"the judge {name} is no metric: name it in `secondary`" for name in judges if name not in names]
    return problems


def _judge(judge: Mapping[str, Any], folder: Path) -> list[str]:
    """What is wrong with a judge: it is an endpoint with three fields, or a scorer of texts."""
    name, texts = judge.get("name"), ("url", "model", "instruction")
    missing = [key for key in texts if judge.get(key) is None]
    if judge.get("scorer") is None:
        if missing:
            return [f"the judge {name} has no {', '.join(missing)}, and no scorer"]
        return [f"the judge {name}: {problem}" for problem in problems_of_url(str(judge["url"]))]
    if len(missing) < len(texts):
        return [f"the judge {name} is an endpoint or a scorer, not both"]
    from steer.evaluation import scorers

    scorer = str(judge["scorer"])
    if any(character < " " for character in scorer):  # "\b" in double quotes is a backspace, which matches nothing
        return [f"the judge {name} has the control character {min(scorer)!r} in its scorer; write it in single quotes"]
    try:
        scorers.parse(scorer, folder, "scorer")
    except SteerError as error:
        return [f"the judge {name}: {problem}" for problem in error.problems]
    return []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _metric(values: Mapping[str, Any]) -> Metric:
    values = {key: value for key, value in values.items() if value is not None}
    numbers = values["name"] in SERVER_METRICS and values["name"] != "refusal"
    kind = values.get("kind", "number" if numbers else "bool")
    floats = {k: float(values[k]) for k in ("smallest_effect", "baseline", "spread", "low", "high") if k in values}
    return Metric(values["name"], kind, values.get("better", "higher"), per=values.get("per", "unit"), **floats)


def _built(values: Mapping[str, Any], file: Path, composed: Arms, readouts: Mapping[str, Probe]) -> Experiment:
    unit, space = values.get("unit", "conversation"), values.get("namespace")
    guardrails = {name: limit for name, (limit, _) in GUARDRAILS.items()}
    guardrails |= values.get("guardrails") or {}  # a limit of null turns the guardrail off
    judges = tuple(
        Judge(**{key: value for key, value in judge.items() if key != "sample_rate"},
              sample_rate=schema.share_of(judge.get("sample_rate", 0.1)) or 0.0,
              digest=readouts[judge["name"]].digest if judge["name"] in readouts else "")
        for judge in values.get("judges", ())
    )  # fmt: skip
    return Experiment(
        name=values["name"],
        arms=composed.arms,
        metric=_metric(values["metric"]),
        salt=values.get("salt", values["name"]),
        model=values.get("model", ""),
        unit=unit if isinstance(unit, str) else f"header:{unit['header'].lower()}",
        coverage=schema.share_of(values.get("coverage", 1.0)) or 0.0,
        namespace=Namespace(space["name"], *map(float, map(schema.share_of, space["range"]))) if space else None,  # type: ignore[arg-type]
        allocation=_allocation(values["allocation"]) if "allocation" in values else None,
        secondary=tuple(map(_metric, values.get("secondary", ()))),
        guardrails={name: float(limit) for name, limit in guardrails.items() if limit is not None},
        judges=judges,
        ramp=tuple(schema.share_of(step) or 0.0 for step in values.get("ramp", ())),
        ramp_responses=values.get("ramp_responses", 200),
        on_breach=values.get("on_breach", "stop"),
        clients_call=values.get("clients_call", "experiment"),
        store_texts=values.get("store_texts", False),
        log=log_url(values.get("log", f"{values['name']}.db"), file.parent),
        file=file,
        vectors=composed.vectors,
        probes=composed.probes,
        readouts=readouts,
        files={name: file.parent / Path(path).expanduser() for name, path in values.get("vectors", {}).items()},
    )


def _allocation(values: Mapping[str, Any]) -> Allocation:
    given = {key: value for key, value in values.items() if value is not None}
    if "smallest_share" in given:
        given["smallest_share"] = schema.share_of(given["smallest_share"])
    return Allocation(**given)


class Address(NamedTuple):
    """What is read of an experiment's file where its arms need not be valid; `unit` is what the file says of it."""

    name: str
    salt: str
    log: str
    file: Path
    unit: Any = "conversation"


def address(reference: str) -> Address:
    """The name, salt and log of an experiment, given by its file or its name. Raises UsageError.

    For commands that read or stop an experiment, which must work where its vectors are not at hand.
    """
    file = find(reference)
    values = _values(file)
    wanted = schema.record({"name": _NAME}, {"salt": schema.text(r"[^\0]{1,200}"), "log": _log})
    problems = schema.problems_of(values, wanted)
    if problems:
        raise UsageError([f"{file.name}: {problem}" for problem in problems], f"steer ab check {file} says more")
    name = values["name"]
    log = log_url(values.get("log") or f"{name}.db", file.parent)
    return Address(name, values.get("salt") or name, log, file, values.get("unit") or "conversation")


def log_url(text: str, folder: Path) -> str:
    """The URL of a log: a URL as it is, or the path of a SQLite file, relative to the folder of the experiment."""
    if re.match(_POSTGRESQL, text):
        return re.sub(_POSTGRESQL, "postgresql+psycopg://", text)
    path = text.removeprefix("sqlite:///")
    return f"sqlite:///{(folder / Path(path).expanduser()).absolute()}"


def find(reference: str) -> Path:
    """The file of an experiment, given by its path or by its name (NAME.yaml in the current folder)."""
    path = Path(reference)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    named = Path(f"{reference}.yaml")
    if named.is_file():
        return named
    raise UsageError(f"there is no experiment {reference!r}: no file {named} here", "steer ab init FILE makes one")
