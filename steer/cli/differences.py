"""How differences between two versions are printed: what they do, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steer.cli.output import out

if TYPE_CHECKING:
    from steer.store.history.behaviour import Compared
    from steer.store.layout import Store


def print_behaviour(compared: Sequence[Compared], before: str, after: str) -> None:
    """The effects of both on each suite, and the paired change with its interval."""
    from steer.store.history.behaviour import value_of

    if not compared:
        out.say(f"neither is evaluated; evaluate both: steer eval {before} {after} --suite SUITE")
        return
    header, rows = behaviour_rows([value_of(each) for each in compared], before, after)
    out.line()
    out.table(header, rows, 2)
    for each in compared:
        if each.before is None or each.after is None:
            missing = before if each.before is None else after
            out.say(f"{missing} has no evaluation on {each.suite}; steer eval {missing} --suite SUITE")


TENSORS = ["parameter", "cosine", "norm ratio", "greatest change"]


def tensor_rows(tensors: Sequence[Mapping[str, Any]], most: int | None = None) -> list[list[str]]:
    """The rows of a table of parameters, those that changed most first."""
    ranked = sorted(tensors, key=lambda each: -each["max_change"])[:most]
    return [
        [each["parameter"], f"{each['cosine']:.3f}", f"{each['norm_ratio']:.3f}", f"{each['max_change']:.3g}"]
        for each in ranked
    ]


def behaviour_rows(compared: Sequence[Mapping[str, Any]], before: str, after: str) -> tuple[list[str], list[list[str]]]:
    """The header and rows of a table of `value_of` comparisons."""

    def figure(value: Mapping[str, Any] | None) -> str:
        return "not evaluated" if value is None else f"{value['mean']:+.3f}"

    def change(value: Mapping[str, Any] | None) -> str:
        return "" if value is None else f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"

    rows = [
        [
            each["suite"], each["metric"], figure(each["before"]), figure(each["after"]), change(each["change"]),
            str(each["change"]["items"]) if each["change"] else "", each["sentence"],
        ]
        for each in compared
    ]  # fmt: skip
    return ["suite", "metric", before, after, "change (95 %)", "items", "what it says"], rows


def answers_of(store: Store, names: tuple[str, str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The answers of two versions to the same prompts, greedily: for each prompt the prompt and both texts.

    Raises SteerError.
    """
    from probes.models.loading import load
    from probes.strengths import Column, try_columns
    from steer.cli.output import say_preparing
    from steer.store.using.resolver import version_of
    from vectors.errors import UsageError
    from vectors.resolve import compose_gated

    found = [version_of(store, name) for name in names]
    if found[0].base != found[1].base:
        raise UsageError(f"the versions have different bases: {found[0].base}, {found[1].base}", "build both, and try")
    say_preparing(found[0].base)
    columns = []
    with out.progress() as on_event:
        loaded = load(found[0].base)
        for each in found:
            composed = compose_gated(str(each.composition), each.files, allow_strength=True)
            answers = try_columns(
                loaded, composed.composition, composed.vectors, prompts, [Column(1.0)], probes=composed.probes,
                scored=False, on_event=on_event,
            )  # fmt: skip
            columns.append([row[0].text for row in answers])
    return [{"prompt": p, "answers": list(pair)} for p, *pair in zip(prompts, *columns, strict=True)]


def markdown(value: Mapping[str, Any], before: str, after: str) -> str:
    """A difference (`versions.difference_value`, with behaviour and answers) as Markdown, for a review or a card."""
    lines = [f"### {before} → {after}", ""]
    rows = []
    for part in value["parts"]:
        if part["before"] is None or part["after"] is None:
            given, what = part["before"] or part["after"], "added" if part["before"] is None else "removed"
            rows.append([part["name"], what, f"strength {given['strength']:g}"])
        else:
            rows.append([part["name"], "changed", "; ".join(f"{e['field']} {_change(e)}" for e in part["fields"])])
    rows += [[each["setting"], "changed", _change(each)] for each in value["settings"]]
    if value["reordered"]:
        rows.append(["the parts", "reordered", ""])
    lines += _table(["part", "", "what changed"], rows) if rows else ["No difference."]
    for part in value["parts"]:
        if part["layers"]:
            lines += ["", f"The layers of {part['name']}:", ""]
            figures = [[str(e["layer"]), f"{e['cosine']:.3f}", f"{e['norm_ratio']:.3f}"] for e in part["layers"]]
            lines += _table(["layer", "cosine", "norm ratio"], figures)
        if part["tensors"]:
            lines += ["", f"The parameters of {part['name']}:", ""]
            lines += _table(TENSORS, tensor_rows(part["tensors"]))
    if value.get("behaviour"):
        lines += ["", *_table(*behaviour_rows(value["behaviour"], before, after))]
    for each in value.get("answers", ()):
        lines += ["", f"> {_cell(each['prompt'])}", "", *_table([before, after], [each["answers"]])]
    return "\n".join(lines)


def _change(each: Mapping[str, Any]) -> str:
    return f"{_plain(each['before'])} → {_plain(each['after'])}"


def _plain(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return f"`{value[7:15]}`"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _cell(text: str) -> str:
    """A text in one cell: it ends no cell and no row, and holds no HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
