"""A composition as files for people: the YAML of the recipe with every digest, and a model card."""

from __future__ import annotations

from typing import Any

from steer.store.objects.model import STEERING, TASK, Part, Personality
from vectors.registry.layers import spans


def yaml_of(personality: Personality) -> str:
    """The recipe as `personality.yaml` has it, with every name pinned to a digest. Equal for equal compositions."""
    import yaml

    value: dict[str, Any] = {"base": personality.base}
    if personality.base_digest:
        value["base_digest"] = personality.base_digest
    value["parts"] = [entry_of(part) for part in personality.parts]
    for key in ("merge", "serve"):
        if getattr(personality, key):
            value[key] = getattr(personality, key)
    if personality.evals:
        value["evals"] = [dict(each) for each in personality.evals]
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def entry_of(part: Part) -> dict[str, Any]:
    """A part as an entry of `parts:`, without what is the default."""
    entry: dict[str, Any] = {"name": part.name, "digest": part.digest, "strength": part.strength}
    if part.operation != "add":
        entry["operation"] = part.operation
    if part.layers is not None:
        entry["layers"] = spans(part.layers)
    for key in ("scope", "condition"):
        if getattr(part, key) is not None:
            entry[key] = getattr(part, key)
    return entry


def card(personality: Personality) -> str:
    """A model card in Markdown, as the Hugging Face hub shows it. Equal for equal compositions."""
    steering, task = personality.of_kind(STEERING), personality.of_kind(TASK)
    lines = ["---", "library_name: steer", f"base_model: {personality.base}", "tags: [steering, steer]", "---", ""]
    lines += ["# A personality for " + personality.base, ""]
    if steering:
        lines += ["While the model runs:", "", f"    {personality.expression()}", ""]
    if task:
        method = personality.merge.get("method", "task_arithmetic")
        lines += [f"In the weights, by `{method}`:", ""]
        lines += [f"- {part.strength:g} x {part.name}" for part in task] + [""]
    lines += ["| part | kind | strength | digest |", "|---|---|---|---|"]
    lines += [f"| {part.name} | {part.kind} | {part.strength:g} | `{part.digest}` |" for part in personality.parts]
    return "\n".join(lines) + "\n"
