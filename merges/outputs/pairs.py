"""A base and a model fine-tuned from it, checked against each other, and the delta of each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merges.engine.floats import MERGEABLE
from merges.engine.pool import Pool
from merges.engine.tensor_task import Block, Computation, Input, TensorTask
from merges.inputs.alignment import align
from merges.inputs.sources import Source, open_source
from merges.recipes.agreement import settings, tokenizers
from vectors.errors import ModelError, SteerError, first_of, shortened
from vectors.events import Event, OnEvent, ignore
from vectors.weights import mapped

DELTAS = Computation(space="delta")  # a computation that only reads deltas


def open_pair(
    base: str, finetuned: str, allow_config: Sequence[str] = (), *, on_event: OnEvent = ignore
) -> tuple[Source, Source]:
    """Open both models and check by their headers, settings and tokenizers that they match.

    `allow_config` are the settings that may differ, as in a recipe; `on_event` receives notes. Raises ModelError with
    all problems.
    """
    opened: list[Source] = []
    problems: list[str] = []
    hints: list[str] = []
    for reference in (base, finetuned):
        try:
            opened.append(open_source(reference))
        except SteerError as error:
            problems += error.problems
            hints.append(error.hint)
    if problems:
        raise ModelError(problems, "; ".join(dict.fromkeys(hint for hint in hints if hint)))
    base_model, tuned = opened
    problems += [f"{s.reference} is a {s.kind}, not a model" for s in opened if s.kind != "model"]
    theirs, ours = tuned.config.get("architectures"), base_model.config.get("architectures")
    if theirs != ours:
        problems.append(f"{finetuned} is a {theirs}, {base} a {ours}")
    hint = "a task vector needs a base and a model that was fine-tuned from it"
    if problems:
        raise ModelError(problems, hint)
    notes = align([tuned], base_model)
    allowed = [key for key in allow_config if key != tokenizers.ALLOWED]
    of_settings = settings.compare(base_model, [tuned], allowed)
    try:
        of_tokens = tokenizers.compare(base_model, [tuned], allow_config, models=False)
    except ModelError as error:  # a tokenizer that can't be read: what else is wrong is still found
        of_tokens = tokenizers.Agreement([*error.problems], [])
    if of_tokens.problems and tokenizers.only_added(base_model.path, tuned.path):
        # Rows that no token had are those of the new tokens: nothing is mixed.
        of_tokens = tokenizers.Agreement([], [*of_tokens.notes, *of_tokens.problems])
    hints = [settings.hint(base)] * bool(of_settings.problems)
    hints += [f"--allow-config {tokenizers.ALLOWED} compares rows by their position"] * bool(of_tokens.problems)
    problems += [*of_settings.problems, *of_tokens.problems]
    misfits = []
    for where, names in (
        (base, tuned.entries.keys() - base_model.entries),
        (finetuned, base_model.entries.keys() - tuned.entries),
    ):
        if names:
            misfits.append(f"{where} lacks {shortened(sorted(names))}")
    differing = tuned.entries.keys() ^ base_model.entries
    if differing and all(name in tuned.entries and name.endswith(".bias") for name in differing):
        hint = (
            "a model with folded-in biases has no task vector: merge the steering vectors, or bake with --mode distil"
        )
    shapes, dtypes = [], []
    for name in sorted(base_model.entries.keys() & tuned.entries):
        a, b = base_model.entries[name], tuned.entries[name]
        if a.shape != b.shape:
            shapes.append(f"{name} is {list(a.shape)} in {base}, {list(b.shape)} in {finetuned}")
        elif (a.dtype in MERGEABLE) != (b.dtype in MERGEABLE):
            dtypes.append(f"{name} is {a.dtype} in {base}, {b.dtype} in {finetuned}")
        elif a.dtype not in MERGEABLE and not np.array_equal(mapped(a), mapped(b)):
            dtypes.append(f"{name} is {a.dtype}, not floating-point, and differs")
    of_tensors = [*misfits, *first_of(shapes), *first_of(dtypes)]
    if problems or of_tensors:
        raise ModelError([*problems, *of_tensors], "; ".join([*hints, *([hint] if of_tensors else [])]))
    for note in [*notes, *of_settings.notes, *of_tokens.notes]:
        on_event(Event("taking the difference", message=note))
    return base_model, tuned


def tensor_of(name: str, base_model: Source, tuned: Source, pool: Pool) -> TensorTask:
    """The task of one parameter whose blocks are its delta: `tuned` - `base_model`, float32."""
    entry = tuned.entries[name]
    source = Input(tuned.reference, tuned.reader(name, entry.shape)[0], False)
    dtype = "F32" if entry.dtype == "F64" else entry.dtype
    return TensorTask(name, entry.shape, dtype, (source,), base_model.reader(name, entry.shape)[0], DELTAS, pool)


def deltas(tensor: TensorTask) -> np.ndarray:
    """The whole delta of a task with one input, float32 in the tensor's shape."""
    flat = np.empty(tensor.count, np.float32)

    def fill(block: Block) -> None:
        flat[block.start : block.start + block.values.shape[1]] = block.values[0]

    tensor.map(fill)
    return flat.reshape(tensor.shape)
