"""The file that `steer ab init` writes: an experiment with every key explained, to be edited."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steer.experiments.document import NAME
from steer.experiments.specification import GUARDRAILS, SERVER_METRICS
from vectors.errors import UsageError

_TEMPLATE = """\
# An A/B experiment. Check it: steer ab check {file}      Serve it: steer serve {served} --experiment {file}

name: {name}            # what clients call as their model
{model}
# The arms. `steer` is an expression, which may name versions of the store: "'tone@champion'"; `lora` the folder of an
# adapter; `system` a system prompt, the cheapest rival of a vector. Exactly one arm, the control, has none of them.
# Give every arm a `weight` (they sum to 1), or none of them.
arms:
{arms}
# The vectors that expressions name, as files relative to this one. NAME.safetensors beside this file needs no line.
# vectors: {{warm: warm.safetensors}}

# What is assigned to an arm: `conversation` (found again by the header X-Steer-Conversation, else by its first
# message), `user` (the field `user` of a request), or a header, such as {{header: X-Session-Id}}.
unit: conversation
coverage: 100%        # the share of the units that take part; the others get the control, and do not count
# Fixes who gets which arm, and makes the hashes of units in the log impossible to guess: keep it to yourself.
salt: {salt}
# Experiments of one namespace with ranges that do not overlap never share a unit.
# namespace: {{name: chat, range: [0, 0.5]}}

# The metric that decides. Kinds: bool, number (with `low` and `high` where it is bounded). Sent to /v1/feedback, or
# computed by the server of every answer: {server_metrics}.
metric:
  name: {metric}
  kind: {kind}
  better: higher
  smallest_effect: {effect}   # the difference that would matter, in the metric's unit
  # per: response     # the mean over all answers; by default over units (conversations), each with its own mean
# Metrics that are reported beside it, labelled exploratory.
# secondary: [{{name: response_tokens, better: lower}}]

# By default the weights stay as they are, so that effects can be estimated. Adaptive weights select: the better an arm
# looks, the more new units it gets, until the best arm is known (track-and-stop). `every`: seconds between changes;
# `smallest_share`: of every arm. It needs smallest_effect: arms that differ by less are equally good.
{allocation}

# How much worse than the control an arm may be. What is surely worse stops the experiment. A guardrail that is not
# named has the limit that stands here; null turns it off.
guardrails:
{guardrails}
on_breach: stop       # or warn
# Coverage grows in these steps. The next step needs every arm surely inside the guardrails, after so many responses.
# Answers during the ramp do not count.
# ramp: [1%, 5%, 25%, 50%]
# ramp_responses: 200

# What judges sampled answers: a model behind an endpoint, a scorer (classifier, words, regex), or a probe that the
# served model reads. Each is a metric, named in `secondary` (or as the metric above).
# judges:
# - {{name: polite, url: "https://host/v1", model: judge, instruction: "Is the answer polite?", sample_rate: 5%}}
# - {{name: cheerful, scorer: "classifier:org/name", sample_rate: 5%}}
# - {{name: warmth, scorer: "probe:warmth-probe.safetensors", sample_rate: 5%}}

clients_call: experiment   # `model`: requests for the served model take part too, those that can get every arm
store_texts: false         # true stores prompts and answers in the log
log: {log}           # a SQLite file, or postgresql://USER@HOST/DATABASE for several servers
"""

_ALLOCATION = "allocation: {method: track-and-stop, smallest_share: 5%, every: 60}"
_ANY_MODEL = "# model: smollm2     # the model that is to be served; any, without this line"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What `steer ab init` knows of an experiment: arms by name, as expressions, adapters and system prompts."""

    name: str
    file: str
    arms: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)  # what arms that are commits of the store were called
    loras: Mapping[str, str] = field(default_factory=dict)
    systems: Mapping[str, str] = field(default_factory=dict)
    metric: str = "thumbs"
    model: str = ""
    adaptive: bool = False


def problems_of(draft: Draft) -> list[str]:
    """What is wrong with a draft; its expressions are checked by `document.check`."""
    names = [*draft.arms, *draft.loras, *draft.systems]
    problems = [f"{name!r} is not a name of letters, digits, _, . and -" for name in (draft.name, draft.metric, *names)
                if not re.fullmatch(NAME, name)]  # fmt: skip
    problems += [f"the arm {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(names) < 2:
        problems.append(f"an experiment compares at least two arms, and {len(names)} is given")
    if "" not in draft.arms.values():
        problems.append("no arm is the control: give one without an expression")
    return problems


def written(draft: Draft) -> str:
    """The text of the file. Raises UsageError."""
    problems = problems_of(draft)
    if problems:
        raise UsageError(problems, "steer ab init tone.yaml --arm control= --arm friendly='1.2*warm' --metric thumbs")
    number = draft.metric in SERVER_METRICS and draft.metric != "refusal"
    return _TEMPLATE.format(
        name=draft.name,
        file=draft.file,
        served=draft.model or "MODEL",
        model=f"model: {_quoted(draft.model)}" if draft.model else _ANY_MODEL,
        arms="\n".join(_arms(draft)),
        salt=f"{draft.name}-{secrets.token_hex(16)}",
        metric=draft.metric,
        server_metrics=", ".join(SERVER_METRICS),
        kind="number" if number else "bool",
        effect=10 if number else 0.05,
        allocation=_ALLOCATION if draft.adaptive else f"# {_ALLOCATION}",
        guardrails="\n".join(f"  {f'{name}: {limit:g}':<20}# {what}" for name, (limit, what) in GUARDRAILS.items()),
        log=f"{draft.name}.db",
    )  # fmt: skip


def _arms(draft: Draft) -> Sequence[str]:
    lines = [
        f"  {name}: {{steer: {_quoted(text)}}}{_comment(draft, name)}" if text else f"  {name}: {{}}"
        for name, text in draft.arms.items()
    ]
    lines += [f"  {name}: {{lora: {_quoted(folder)}}}" for name, folder in draft.loras.items()]
    return [*lines, *(f"  {name}: {{system: {_quoted(text)}}}" for name, text in draft.systems.items())]


def _comment(draft: Draft, name: str) -> str:
    """What a commit was called, behind it."""
    return f"   # {draft.versions[name]}" if name in draft.versions else ""


def _quoted(text: str) -> str:
    """Text as YAML: a JSON string is one."""
    return json.dumps(text, ensure_ascii=False)
