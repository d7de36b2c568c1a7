"""The settings of the inputs' configurations: those that change what weights mean have to agree.

Weights that were trained with one rope base, activation or norm epsilon do not mean the same under another, so their
average is no model of either. Configurations are compared as transformers reads them: what a file leaves out has the
default of its configuration class, and older spellings (`rope_theta`, `rope_scaling`) equal the newer ones
(`rope_parameters`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from merges.inputs.sources import Source
from merges.recipes.agreement.fields import DEPTH, LENGTH_MATTERS, group_of

ABSENT = object()
SHOWN = 60  # characters of a value in a message


class Difference(NamedTuple):
    """A field with different values in two models; its name has dots where configurations are nested."""

    key: str
    ours: Any
    theirs: Any
    known: bool  # whether the configuration class has such a field; others have no effect in transformers

    def sentence(self, main: str, other: str) -> str:
        """Such as `rope_theta is 10000.0 in A, 500000.0 in B`."""
        return f"{self.key} is {_shown(self.ours)} in {main}, {_shown(self.theirs)} in {other}"


class Agreement(NamedTuple):
    """The result of a comparison: problems, for which a merge is refused, and notes for the user."""

    problems: list[str]
    notes: list[str]


def compare(main: Source, others: Sequence[Source], allowed: Sequence[str] = (), *, stacked: bool = False) -> Agreement:
    """Compare the configurations of models with that of `main`, which the result takes.

    `allowed` are fields that may differ: whole names, or parts of them between dots. With `stacked`, layers are taken
    from several models, which may have different numbers of them.
    """
    problems, notes, used = [], [], set()
    noted: dict[str, list[str]] = {}
    for other in others:
        for difference in differences(main.config, other.config):
            if stacked and _by_layer(difference):
                continue
            sentence = difference.sentence(main.reference, other.reference)
            key = next((key for key in allowed if _names(key, difference.key)), None)
            group = _group(difference, main.config, other.config)
            if key is not None:
                used.add(key)
                notes.append(f"{sentence}: merged as allowed, and the result has that of {main.reference}")
            elif group is not None and group.noted:
                noted.setdefault(difference.key, []).append(f"{_shown(difference.theirs)} in {other.reference}")
            elif group is None and difference.known:
                problems.append(sentence)
            elif group is None:
                noted.setdefault(difference.key, []).append(f"{_shown(difference.theirs)} in {other.reference}")
    if noted:
        values = "; ".join(f"{key} ({', '.join(values)})" for key, values in noted.items())
        notes.append(
            f"settings that do not change the weights are those of {main.reference}, though others differ: {values}"
        )
    notes += [f"no input differs in {key}, which is allowed" for key in allowed if key not in used]
    return Agreement(problems, notes)


def hint(main: str) -> str:
    """The next step for settings that differ; `main` is the model whose settings the result takes."""
    return (
        "weights do not mean the same under other settings; --allow-config NAME merges them nevertheless, "
        f"with that of {main}"
    )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Every field in which two configurations differ, as transformers reads them, also those without consequence."""
    flat = [_flat(config) for config in (ours, theirs)]
    unlike = {key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key, ABSENT) != flat[1].get(key, ABSENT)}
    if all(group_of(key) is not None for key in unlike):
        return [Difference(key, flat[0].get(key, ABSENT), flat[1].get(key, ABSENT), True) for key in sorted(unlike)]
    if _spelled_differently_alone(ours, theirs):
        return []
    classes = _class_of(ours), _class_of(theirs)
    read = [_read(config, kind) for config, kind in zip((ours, theirs), classes, strict=True)]
    if None in read:  # a class that refuses one of them, or code of its own: compared as they stand
        flat = [_flat(_plain(config)) for config in (ours, theirs)]
        fields = None
    else:
        flat, fields = [_flat(config or {}) for config in read], _fields(classes[0], read[0] or {})
    result = []
    for key in sorted(flat[0].keys() | flat[1].keys()):
        values = [side.get(key, ABSENT) for side in flat]
        if values[0] != values[1] and not ({ABSENT, None} >= {*map(_hashable, values)}):
            name = key.removeprefix("rope_parameters.")
            result.append(Difference(name, values[0], values[1], fields is None or _known(key, fields)))
    return result


def _spelled_differently_alone(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two configurations are equal but for the spelling of rope settings, as versions of transformers write it.

    This is seen without importing transformers, which takes seconds. A field that is null in one and absent in the
    other may have a default in its class, so only `rope_scaling`, which has none, counts as equal then.
    """
    nulls = [{key for key, value in _flat(config).items() if value is None} for config in (ours, theirs)]
    if any(key.rpartition(".")[2] != "rope_scaling" for key in nulls[0] ^ nulls[1]):
        return False
    return _flat(_plain(ours)) == _flat(_plain(theirs))


def _group(difference: Difference, *configs: Mapping[str, Any]) -> Any:
    """The group of fields that a difference belongs to; None for a field that has to agree."""
    group = group_of(difference.key)
    if group is not None and difference.key.rpartition(".")[2] == "max_position_embeddings":
        kinds = {
            str(value)
            for config in configs
            for key, value in _flat(_plain(config)).items()
            if key.endswith("rope_type")
        }
        return None if kinds & set(LENGTH_MATTERS) else group
    if difference.key.rpartition(".")[2] == "max_window_layers" and any(_windowless(config) for config in configs):
        return group_of("use_cache")
    return group


def _windowless(config: Mapping[str, Any]) -> bool:
    """Whether the number of layers with a window is unused: there are none, or each layer says whether it has one."""
    text = config.get("text_config") or config
    return not text.get("use_sliding_window", True) or "layer_types" in text


def _by_layer(difference: Difference) -> bool:
    """Whether it is the number of layers, or a list with an entry for each layer."""
    lists = isinstance(difference.ours, list) and isinstance(difference.theirs, list)
    return difference.key.rpartition(".")[2] in (*DEPTH, "max_window_layers") or (
        lists and len(difference.ours) != len(difference.theirs)
    )


def _names(key: str, field: str) -> bool:
    """Whether `key`, as the user gave it, names the field or an outer part of it."""
    return f".{key}." in f".{field}." or field.startswith(f"{key}.") or f"rope_parameters.{field}" == key


def _shown(value: Any) -> str:
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _hashable(value: Any) -> Any:
    return value if value is None or value is ABSENT else 0


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values by their dotted names, without those that never matter."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        group = group_of(name)
        if group is not None and not group.noted:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _class_of(config: Mapping[str, Any]) -> Any:
    """transformers' configuration class of a model, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except (LookupError, TypeError, ImportError):
        return None


def _read(config: Mapping[str, Any], kind: Any) -> dict[str, Any] | None:
    """The configuration with all defaults of its class, in its newest spelling; None if the class refuses it."""
    if kind is None:
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about fields that do not matter here
    try:
        value: dict[str, Any] = kind.from_dict(dict(config)).to_dict()
    except Exception:  # whatever a class of theirs raises for values that it does not expect
        return None
    finally:
        logger.setLevel(level)
    return _without_old_type(value)


def _without_old_type(value: Any) -> Any:
    """The value without `type` beside `rope_type`, of which it is the older spelling."""
    if not isinstance(value, dict):
        return value
    return {k: _without_old_type(v) for k, v in value.items() if not (k == "type" and "rope_type" in value)}


def _fields(kind: Any, read: Mapping[str, Any]) -> set[str]:
    """The names of the fields that a configuration class and those nested in it have."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    names |= {"model_type", *(getattr(kind, "attribute_map", None) or {})}
    for name, nested in (getattr(kind, "sub_configs", None) or {}).items():
        inner = read.get(name)
        if isinstance(inner, Mapping):
            names = {*names, *(f"{name}.{field}" for field in _fields(_class_of(inner) or nested, inner))} - {name}
    return names


def _known(key: str, fields: set[str]) -> bool:
    return any(key == field or key.startswith(f"{field}.") for field in fields)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with rope settings in their newest spelling, without absent values and unused windows."""
    rope: dict[str, Any] = {}
    spellings = ("rope_scaling", "rope_parameters")
    result = {
        key: _plain(value) if isinstance(value, Mapping) and key not in spellings else value
        for key, value in config.items()
        if value is not None
    }
    for key in spellings:
        if isinstance(result.get(key) or {}, Mapping):  # anything else is compared as it stands
            rope |= dict(result.pop(key, None) or {})
    if "rope_theta" in result:
        rope["rope_theta"] = result.pop("rope_theta")
    if rope:
        rope.setdefault("rope_type", rope.pop("type", "default"))
        result["rope" if "rope_parameters" in result else "rope_parameters"] = rope
    if result.get("use_sliding_window") is False:
        result.pop("sliding_window", None)
    return result
