"""What the commands of the store share: how versions and differences are printed."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from steer.cli.output import out
from vectors.errors import UsageError

if TYPE_CHECKING:
    from steer.evaluation.evaluation import Evaluation
    from steer.evaluation.request import Request
    from steer.store.history.differences import Difference
    from steer.store.layout import Store
    from steer.store.objects.model import Commit


SHOWN = 12  # parameters of a task vector that are printed


def typed() -> str:
    """The command as it was typed, for the record of moves."""
    return shlex.join(["steer", *sys.argv[1:]])[:2000]


def names_of(store: Store) -> dict[str, list[str]]:
    """The names of each commit, as the log shows them: the current branch with a star."""
    from steer.store import refs

    here = refs.current(store)
    found: dict[str, list[str]] = {}
    for ref, digest in refs.every(store).items():
        name = str(ref)
        if ref.kind != "branch" and ref.name == here:
            name = name.removeprefix(here)  # :v1 and @champion are those of the current branch
        found.setdefault(digest, []).append(f"*{name}" if name == here else name)
    return found


def log_lines(store: Store, commits: Iterable[Commit], names: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The history as a graph: for each commit its digest, names, age and author, its message and what changed."""
    from functools import lru_cache, partial

    from steer.store.history import graph
    from steer.store.history.behaviour import evaluations_if_whole, means
    from steer.store.history.differences import compare, summary
    from steer.store.names import short
    from steer.store.objects.model import Personality, read_composition

    # Each is wanted twice: as a version, and as what was before its child, which is mostly the next one printed.
    composition_of = lru_cache(maxsize=256)(partial(read_composition, store))
    evaluations_of = lru_cache(maxsize=256)(partial(evaluations_if_whole, store))
    columns: list[str] = []  # the commit that each column of the graph waits for
    for commit in commits:
        if commit.digest not in columns:
            columns.append(commit.digest)
        column = columns.index(commit.digest)
        mark = " ".join("*" if i == column else "|" for i in range(len(columns)))
        labels = f"  ({', '.join(names[commit.digest])})" if commit.digest in names else ""
        yield f"{mark} {short(commit.digest)}{labels}  {age(commit.time)}  {commit.author}"
        # The first parent takes the commit's column; others get columns of their own; equal columns become one.
        columns[column : column + 1] = [parent for parent in commit.parents[:1] if parent not in columns]
        columns += [parent for parent in commit.parents[1:] if parent not in columns]
        bars = " ".join("|" for _ in columns) or " "
        after = composition_of(commit.composition)
        parent = graph.node(store, commit.parents[0]).composition if commit.parents else None
        before = composition_of(parent) if parent else Personality(after.base, after.base_digest)
        yield f"{bars}   {commit.title}"
        change = summary(compare(before, after))
        if change:
            yield f"{bars}   {change}"
        now = evaluations_of(commit.composition)
        for sentence in means(now, evaluations_of(parent) if now and parent else []):
            yield f"{bars}   {sentence}"
        yield bars.rstrip()


def age(moment: float) -> str:
    """How long ago, in the largest unit that fits, or the date."""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((60, "second"), (3600, "minute"), (86400, "hour"), (30 * 86400, "day")):
        if seconds < size:
            count = int(seconds // {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[unit])
            return f"{count} {unit}{'s' * (count != 1)} ago"
    try:
        return time.strftime("%Y-%m-%d", time.localtime(moment))
    except (OverflowError, ValueError, OSError):  # a version from elsewhere may have any number as its time
        return "at an unknown time"


def print_difference(store: Store, difference: Difference) -> None:
    """Parts and settings that differ, one line each; of replaced vectors the layers that differ most."""
    from steer.cli.differences import TENSORS, tensor_rows
    from steer.store.history.differences import field_text, layers_of, tensors_of
    from steer.store.objects.card import entry_of

    def described(part: Any) -> str:
        entry = entry_of(part)
        return f"{entry.pop('name')}  " + ", ".join(f"{key} {_short(value)}" for key, value in entry.items())

    for change in difference.parts:
        if change.before is None:
            out.line(f"+ {described(change.after)}")
        elif change.after is None:
            out.line(f"- {described(change.before)}")
        else:
            out.line(f"~ {change.name}  " + ", ".join(_named(*field, field_text(*field)) for field in change.fields))
            layers = layers_of(store, change)
            if layers:
                rows = [[str(e["layer"]), f"{e['cosine']:.3f}", f"{e['norm_ratio']:.3f}"] for e in layers]
                out.table(["layer", "cosine", "norm ratio"], rows)
            tensors = tensors_of(store, change)
            if tensors:
                out.table(TENSORS, tensor_rows(tensors, SHOWN), 1)
            if len(tensors) > SHOWN:
                out.say(f"{len(tensors) - SHOWN} parameters changed less; all of them: --json")
    if difference.reordered:
        out.line("~ the order of the parts")
    for key, old, new in difference.settings:
        out.line(f"~ {key}  {_short(old)} → {_short(new)}")


def _named(name: str, _old: Any, _new: Any, text: str) -> str:
    return f"{name} {text}" if name == "strength" else text


def _short(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return value[7:15]
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def difference_value(store: Store, difference: Difference) -> dict[str, Any]:
    """A difference as JSON."""
    from steer.store.history.differences import layers_of, tensors_of

    return {
        "parts": [
            {
                "name": change.name,
                "before": None if change.before is None else asdict(change.before),
                "after": None if change.after is None else asdict(change.after),
                "fields": [{"field": name, "before": old, "after": new} for name, old, new in change.fields],
                "layers": layers_of(store, change),
                "tensors": tensors_of(store, change),
            }
            for change in difference.parts
        ],
        "reordered": difference.reordered,
        "settings": [{"setting": key, "before": old, "after": new} for key, old, new in difference.settings],
        "equal": not difference,
    }


def commit_value(commit: Commit, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """A commit as JSON."""
    value = asdict(commit) | {"parents": list(commit.parents)}
    return value if names is None else value | {"names": [name.lstrip("*") for name in names.get(commit.digest, [])]}


def is_version(text: str) -> bool:
    """Whether a text is no file and names a version of the store."""
    from steer.store import layout, names

    store = layout.find()
    if store is None or os.path.exists(text) or text.startswith("prompt:"):
        return False
    return names.find(store, text) is not None


def with_versions(request: Request) -> tuple[Request, dict[str, str]]:
    """A request of an evaluation with versions of the store as expressions over their files, under their names.

    Returns the composition's digest by the name of the version. Raises UsageError for two names of one composition.
    """
    from dataclasses import replace

    from steer.store import layout
    from steer.store.using.resolver import version_of

    subjects, files, digests, bases = [], dict(request.vectors), {}, set()
    names: dict[str, str] = {}  # of versions, by expression
    problems: list[str] = []
    for text in request.subjects:
        if is_version(text):
            version = version_of(layout.require(), text)
            expression = str(version.composition)
            if names.setdefault(expression, text) != text:
                problems.append(f"{names[expression]} and {text} are versions of one composition, {expression}")
                continue
            subjects.append(expression)
            files |= version.files
            digests[text] = version.recipe
            bases.add(version.base)
        else:
            subjects.append(text)
    if problems:
        raise UsageError(problems, "there is nothing to compare: give one of them")
    model = request.model or (bases.pop() if len(bases) == 1 else None)
    return replace(request, subjects=tuple(subjects), vectors=files, model=model, subject_names=names), digests


def attach_evaluation(digests: Mapping[str, str], evaluation: Evaluation, value: Mapping[str, Any]) -> None:
    """Attach an evaluation to the versions that it was about, each with what concerns it; `value` is its report."""
    import json

    from steer.store import layout, referrers
    from steer.store.history.behaviour import ITEMS, items_of

    if not digests:
        return
    store = layout.require()
    for subject in value["subjects"]:
        composition = digests.get(subject["subject"])
        if composition is not None:
            # The folder of a version that was built is a temporary one.
            named = {**subject, "subject": composition} if os.path.isdir(subject["subject"]) else subject
            content = json.dumps({**value, "subjects": [named]}, sort_keys=True, ensure_ascii=False).encode()
            files = {"report.json": content, ITEMS: items_of(evaluation, subject["subject"])}
            referrers.attach(store, composition, referrers.EVALUATION, files)
            out.say(f"the evaluation is attached to the composition {composition[:15]}…")
