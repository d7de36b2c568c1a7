"""What an adapter's tensors do to its base, as PEFT's `merge_and_unload` does it.

LoRA: delta = scale * B @ A (Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732). DoRA:
the vectors of base + delta are scaled to given lengths (Liu et al. 2024, arXiv:2402.09353). (IA)3: rows or columns are
scaled (Liu et al. 2022, arXiv:2205.05638). Rows of trained tokens, and whole parameters, replace those of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from merges.engine.adapted import Magnitude, Scaled
from merges.engine.readers import Array, Dense, LowRank, Reader, Rows, Sum, read_whole
from merges.inputs.adapters import experts
from merges.inputs.adapters.base import Base
from merges.inputs.adapters.keys import Contents, Module, same
from merges.inputs.adapters.settings import MERGE_FIRST, Settings
from vectors.weights import Entry


@dataclass(eq=False)
class Changes:
    """The deltas to add and the weights that replace the base's, by parameter; and the problems of the adapter."""

    deltas: dict[str, Reader] = field(default_factory=dict)
    weights: dict[str, Reader] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    hint: str = ""


def of(contents: Contents, settings: Settings, base: Base) -> Changes:
    """The changes that the adapter makes to `base`; an adapter that can't be applied exactly has `problems`."""
    changes = Changes()
    contents = _without_tied_head(contents, base, changes)
    for name, (key, entry) in contents.replaced.items():
        _replace(changes, base, name, key, entry)
    in_experts = {}
    for name, module in contents.modules.items():
        parameter = base.parameter(f"{name}.weight")
        if parameter is None and settings.values.get("target_parameters"):
            in_experts[name] = module
        elif parameter is None:
            changes.problems.append(f"changes {name}, which the base lacks")
        elif module.factors and not settings.selects(name):
            changes.problems.append(
                f"holds factors of {name}, which its settings leave out (target_modules and others)"
            )
        else:
            _change(changes, base, settings, name, module, parameter)
    if in_experts:
        added, problems = experts.deltas(in_experts, settings, base)
        changes.deltas |= added
        changes.problems += problems
    return changes


def _current(changes: Changes, base: Base, parameter: str) -> Reader:
    """The weights of a parameter as changed so far."""
    return changes.weights.get(parameter) or Dense(base.entries[parameter])


def _replace(changes: Changes, base: Base, name: str, key: str, entry: Entry) -> None:
    parameter = base.parameter(name)
    if parameter is None:
        changes.problems.append(f"holds {key}, which matches no parameter of the base")
    elif base.entries[parameter].shape != entry.shape:
        before, after = list(base.entries[parameter].shape), list(entry.shape)
        if before[1:] == after[1:]:
            changes.problems.append(
                f"holds {key} with {after[0]} rows, where the base has {before[0]}: its vocabulary is another"
            )
            changes.hint = f"resize the base's embeddings to {after[0]} rows as it was trained, or {MERGE_FIRST}"
        else:
            changes.problems.append(f"holds {key} {after}, where the base has {before}")
    else:
        changes.weights[parameter] = Dense(entry)


def _change(changes: Changes, base: Base, settings: Settings, name: str, module: Module, parameter: str) -> None:
    """What factors, magnitudes, scales and rows do to one parameter."""
    if not base.merges(parameter):
        changes.problems.append(f"changes {parameter}, which is {base.entries[parameter].dtype} in the base")
        return
    if module.tokens is not None:
        _put_rows(changes, base, settings, name, module.tokens, parameter)
    if module.scales is not None:
        _scale(changes, base, settings, name, module.scales, parameter)
    if not module.factors:
        if module.magnitude is not None:
            changes.problems.append(f"has a magnitude of {name} and no factors of it")
        return
    if settings.kind != "LORA":
        changes.problems.append(f"is of the type {settings.kind} and holds factors of {name}")
        return
    delta = _delta(changes, base, settings, name, module, parameter)
    if delta is None:
        return
    if module.magnitude is not None or settings.values.get("use_dora"):
        _set_lengths(changes, base, name, module, parameter, delta)
    elif parameter in changes.weights:
        changes.weights[parameter] = Sum(changes.weights[parameter], delta)
    else:
        changes.deltas[parameter] = delta
    _shift_bias(changes, base, settings, name, module)


def _delta(
    changes: Changes, base: Base, settings: Settings, name: str, module: Module, parameter: str
) -> LowRank | None:
    """The low-rank delta of a module, or None where its factors do not fit, which is entered as a problem."""
    if not {"A", "B"} <= set(module.factors):
        changes.problems.append(f"has only one factor of {name}")
        return None
    shape = base.entries[parameter].shape
    up, down = numbers(module.factors["B"]), numbers(module.factors["A"])
    rank = settings.rank(name)
    if not module.embedding and up.ndim > 2:  # a convolution, whose second factor has a kernel of one point
        up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        changes.problems.append(f"has factors of {name} whose shapes do not match")
    elif up.shape[1] != rank:
        changes.problems.append(f"has factors of rank {up.shape[1]} for {name}, where its settings say {rank}")
    else:
        product = (up.shape[0], down.shape[1])
        transposed = module.embedding or (len(shape) == 2 and base.transposed(parameter, product))
        final: tuple[int, ...] = product[::-1] if transposed else product
        if len(shape) > 2 and not transposed and (shape[0], int(np.prod(shape[1:]))) == product:
            final = shape
            if module.magnitude is not None:
                changes.problems.append(f"has a magnitude of {name}, a convolution: DoRA is applied to matrices only")
                return None
        if final == shape:
            return LowRank(up, down, settings.scale(name), transpose=transposed, shape=final)
        changes.problems.append(f"has a delta of shape {list(final)} for {parameter}, which is {list(shape)}")
    return None


def _set_lengths(changes: Changes, base: Base, name: str, module: Module, parameter: str, delta: LowRank) -> None:
    shape = base.entries[parameter].shape
    outputs = module.factors["B"].shape[0]
    transposed = module.embedding or base.transposed(parameter, (outputs, module.factors["A"].shape[-1]))
    if module.magnitude is None:
        changes.problems.append(f"uses DoRA and has no magnitude of {name}")
    elif module.magnitude.elements != shape[1 if transposed else 0]:
        changes.problems.append(f"has a magnitude of {name} with {module.magnitude.elements} values")
    else:
        adapted = Sum(_current(changes, base, parameter), delta)
        changes.weights[parameter] = Magnitude(adapted, numbers(module.magnitude).reshape(-1), 1 if transposed else 0)


def _shift_bias(changes: Changes, base: Base, settings: Settings, name: str, module: Module) -> None:
    entry = module.factors.get("bias")
    if entry is None:
        return
    bias = base.parameter(f"{name}.bias")
    if bias is None or base.entries[bias].shape != entry.shape:
        changes.problems.append(f"adds a bias to {name}, which has none of this shape in the base")
        return
    shift = Array(numbers(entry) * np.float32(settings.scale(name)))
    if bias in changes.weights:
        changes.weights[bias] = Sum(changes.weights[bias], shift)
    else:
        changes.deltas[bias] = shift


def _scale(changes: Changes, base: Base, settings: Settings, name: str, entry: Entry, parameter: str) -> None:
    """(IA)3: the outputs of a layer are scaled, or the inputs of a feed-forward layer."""
    shape = base.entries[parameter].shape
    along = next((axis for axis in (0, 1) if len(entry.shape) == 2 and entry.shape[1 - axis] == 1), None)
    if settings.kind != "IA3" or along is None or len(shape) != 2:
        changes.problems.append(f"holds scales of {name} that can't be applied")
        return
    if shape[0] == shape[1]:
        transposed = base.transposed(parameter, (shape[0], shape[1]))
    else:
        transposed = shape[1 - along] == entry.elements
    axis = 1 - along if transposed else along
    if shape[axis] != entry.elements:
        changes.problems.append(f"has {entry.elements} scales for {name}, where the base has {list(shape)}")
        return
    scales = numbers(entry).reshape(-1)
    changes.weights[parameter] = Scaled(_current(changes, base, parameter), scales, axis)
    bias = base.parameter(f"{name}.bias") if along == 0 else None
    if bias is not None:
        changes.weights[bias] = Scaled(_current(changes, base, bias), scales, 0)


def _put_rows(changes: Changes, base: Base, settings: Settings, name: str, entry: Entry, parameter: str) -> None:
    """Replace the rows of trained tokens in an embedding, [tokens, hidden]."""
    rows, width = base.entries[parameter].shape
    indices = settings.values.get("token_indices" if settings.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((group for key, group in indices.items() if name == key or name.endswith("." + key)), None)
    if indices is None or entry.shape != (len(indices), width):
        changes.problems.append(f"has rows of tokens for {name} that do not fit its settings or the base")
    elif min(indices, default=0) < 0 or max(indices, default=0) >= rows:
        changes.problems.append(f"trains the token {max(indices)} of {name}, where the base has {rows} rows")
    else:
        reader_of_row, row_in_reader = np.zeros(rows, np.int64), np.arange(rows)
        reader_of_row[indices], row_in_reader[indices] = 1, np.arange(len(indices))
        readers = [_current(changes, base, parameter), Dense(entry)]
        changes.weights[parameter] = Rows(readers, reader_of_row, row_in_reader)


def _without_tied_head(contents: Contents, base: Base, changes: Changes) -> Contents:
    """The contents without changes of a tied head that repeat those of the embedding; any others are problems.

    Head and embedding are one tensor in the base, to which PEFT would apply the changes of both, so the result would
    not be the model that was trained.
    """
    embedding = base.embedding
    if not base.tied or embedding is None:
        return contents
    heads = [name for name in contents.replaced if base.is_tied_head(name)]
    tables = [name for name in contents.replaced if base.parameter(name) == embedding]
    changed = [n for n in (*heads, *tables) if not same(contents.replaced[n][1], base.entries[embedding])]
    replaced = {name: value for name, value in contents.replaced.items() if name not in (*heads, *tables)}
    modules = {
        name: module
        for name, module in contents.modules.items()
        if (module.factors or module.tokens is not None)
        and (base.is_tied_head(f"{name}.weight") or base.parameter(f"{name}.weight") == embedding)
    }
    rows = next((m.tokens for name, m in modules.items() if base.parameter(f"{name}.weight") == embedding), None)
    repeated = [
        name
        for name, module in modules.items()
        if base.is_tied_head(f"{name}.weight") and rows is not None and not module.factors
        if module.tokens is not None and same(module.tokens, rows)
    ]
    separate = [
        name
        for name, module in modules.items()
        if name not in repeated and (module.factors or base.is_tied_head(f"{name}.weight"))
    ]
    identical = len(heads) == len(tables) == 1 and same(contents.replaced[heads[0]][1], contents.replaced[tables[0]][1])
    resized = [n for n in tables if contents.replaced[n][1].shape != base.entries[embedding].shape]
    if resized:
        replaced |= {name: contents.replaced[name] for name in resized}
    elif separate or (changed and not identical):
        which = ", ".join(sorted({*separate, *(name.removesuffix(".weight") for name in changed)}))
        changes.problems.append(f"changes {which} apart, where the base's head is its embedding, one tensor")
        changes.hint = (
            "untie them as it was trained: load the base, give the head a copy of the embedding and set "
            f"tie_word_embeddings to false, then {MERGE_FIRST}"
        )
    elif changed:
        replaced[tables[0]] = contents.replaced[tables[0]]
    rest = {name: module for name, module in contents.modules.items() if name not in (*separate, *repeated)}
    return Contents(rest, replaced, contents.problems)


def numbers(entry: Entry) -> np.ndarray:
    """A tensor as float32, in its shape."""
    return read_whole(Dense(entry))
