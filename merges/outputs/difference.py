"""The task vector of a fine-tuned model against its base, streamed; with the error of a lossy storage."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from merges.engine.floats import MERGEABLE, encode, storage, to_float32
from merges.engine.pool import Pool
from merges.engine.readers import Dense
from merges.engine.selection import magnitudes
from merges.engine.tensor_task import Block, TensorTask
from merges.inputs import bases
from merges.inputs.low_rank import factors
from merges.inputs.sources import Source
from merges.outputs.pairs import deltas, open_pair, tensor_of
from vectors import references
from vectors.errors import ArtifactError, SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, counter, ignore
from vectors.registry.options import retained_count
from vectors.task import TaskVector
from vectors.taskwriter import Writer, require_vector_path, shards, write_files
from vectors.weights import SIZES, Entry


class Storage(NamedTuple):
    """How deltas are stored: `kind` is exact, bf16, lowrank or sparse; `value` is the rank or the density."""

    kind: str
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("exact", "bf16") else f"{self.kind}:{self.value:g}"


def parse_storage(text: str) -> Storage:
    """Read a storage as users write it: `exact`, `bf16`, `lowrank:R` or `sparse:D`. Raises UsageError."""
    kind, _, number = text.partition(":")
    valid = {"exact": not number, "bf16": not number}.get(kind, False)
    if kind == "lowrank" and re.fullmatch(r"[1-9]\d*", number):
        valid = True
    if kind == "sparse":
        with contextlib.suppress(ValueError):
            valid = 0 < float(number) <= 1
    if not valid:
        raise UsageError(
            f"there is no storage {text!r}",
            "use exact, bf16, lowrank:R (such as lowrank:16) or sparse:D with D in (0, 1]",
        )
    return Storage(kind, float(number) if number else 0.0)


class _Error:
    """The approximation error of a storage, summed over pieces in their order."""

    def __init__(self) -> None:
        self.squares = self.lost = self.greatest = 0.0

    def add(self, squares: float, lost: float, greatest: float) -> None:
        self.squares, self.lost = self.squares + squares, self.lost + lost
        self.greatest = max(self.greatest, greatest)

    def value(self) -> dict[str, float]:
        return {
            "relative": math.sqrt(self.lost / self.squares) if self.squares else 0.0,
            "greatest": self.greatest,
        }


def diff(
    base: str, finetuned: str, out: str | Path, *, storage_: str = "exact", threads: int | None = None,
    shard: int | None = None, allow_config: Sequence[str] = (), on_event: OnEvent = ignore,
) -> TaskVector:  # fmt: skip
    """Write the task vector of `finetuned` against `base` to `out`; headers are checked before a weight is read.

    `storage_` is as `parse_storage` reads it; `shard` is the largest size of a file in bytes; `allow_config` names the
    settings of the configurations that may differ (`vocabulary`: the ids of tokens).

    Raises UsageError, ModelError, OutputError, and ArtifactError for values that are not finite.
    """
    chosen_storage, path, errors = Storage("exact"), Path(out), list[SteerError]()
    with collecting(errors):
        chosen_storage = parse_storage(storage_)
    with collecting(errors):
        require_vector_path(path, 1)
    with collecting(errors):
        base_model, tuned = open_pair(base, finetuned, allow_config, on_event=on_event)
    raise_together(errors)
    names = [name for name in sorted(base_model.entries) if base_model.entries[name].dtype in MERGEABLE]
    width = {"bf16": 2.0, "sparse": 12 * chosen_storage.value}.get(chosen_storage.kind, 4.0)
    sizes = {name: int(base_model.entries[name].elements * width) for name in names}
    groups = shards(sizes, *([shard] if shard else []))
    require_vector_path(path, len(groups))
    _require_room(path, sum(sizes.values()))
    assert base_model.model is not None
    assert tuned.model is not None
    common: dict[str, Any] = {
        "base": references.identity(base_model.model),
        "model": references.identity(tuned.model),
        "method": {"name": "diff"},
    }
    licence = references.licence(base_model.model)
    if licence:
        common["licence"] = licence
    report, error = counter(on_event, "taking the difference", "bytes"), _Error()
    done, total = 0, sum(_bytes_of(base_model.entries[name]) for name in names)
    with Pool(threads) as pool:

        def write_parameter(writer: Writer, name: str) -> str | None:
            nonlocal done
            tensor = tensor_of(name, base_model, tuned, pool)
            changed = _write(writer, tensor, tuned, chosen_storage, error)
            done += _bytes_of(base_model.entries[name])
            report(done, total)
            return tensor.dtype if changed else None

        def stored() -> dict[str, Any]:
            return {
                "storage": {"kind": str(chosen_storage)}
                | ({"error": error.value()} if chosen_storage.kind != "exact" else {})
            }

        shapes = {name: base_model.entries[name].shape for name in names}
        write_files(path, groups, shapes, common, write_parameter, stored)
    bases.remember(common["base"]["digest"], base_model.path)
    return TaskVector.open(path)


def _bytes_of(entry: Entry) -> int:
    return entry.elements * SIZES[entry.dtype]


def _require_room(path: Path, needed: int) -> None:
    import shutil

    from vectors.errors import OutputError

    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed + (64 << 20):
        raise OutputError(
            f"the vector may take {needed / 1e9:.2f} GB, and {path.absolute().parent} has {free / 1e9:.2f} GB free",
            "free some space, or use --storage bf16, lowrank:R or sparse:D",
        )


def _write(writer: Writer, tensor: TensorTask, tuned: Source, chosen_storage: Storage, error: _Error) -> bool:
    """Write the delta of one parameter. Returns False, and writes nothing, where the parameter did not change."""
    if chosen_storage.kind == "lowrank" and len(tensor.shape) == 2:
        return _write_lowrank(writer, tensor, int(chosen_storage.value), error)
    if chosen_storage.kind == "sparse":
        return _write_sparse(writer, tensor, chosen_storage.value, error)
    dtype = "BF16" if chosen_storage.kind == "bf16" else "F32"
    adapted = tuned.adapter is not None

    def piece(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float, float], bool]:
        result = np.empty(stop - start, storage(dtype))
        offsets, bits, sums, changed = [], [], [0.0, 0.0, 0.0], False
        for begin, end in tensor.chunks(start, stop):
            block = tensor.block(begin, end)
            delta, target = block.values[0], result[begin - start : end - start]
            _require_finite(tensor.name, delta)
            changed |= bool(delta.any())
            if dtype == "F32":
                target[:] = delta
                if chosen_storage.kind != "exact":  # stored in full, but counted in the relative error
                    _measure(delta, target, sums)
                elif not adapted:
                    where = _residual(tensor, tuned, block, delta)
                    offsets.append(where + begin)
                    bits.append(_bits(tuned, tensor.name, begin, end)[where])
            else:
                encode(delta.astype(np.float64), "BF16", target)
                _measure(delta, to_float32(target, "BF16"), sums)
        positions = np.concatenate(offsets) if offsets else np.empty(0, np.int64)
        return (
            result,
            positions,
            np.concatenate(bits) if bits else np.empty(0, np.int32),
            (sums[0], sums[1], sums[2]),
            changed,
        )

    def tasks() -> Iterator[Callable[[], Any]]:
        for span in tensor.groups():
            yield partial(piece, *span)

    writer.begin()
    positions, bits, any_change = [], [], False
    for result, where, exact, sums, changed in tensor.pool.stream(tasks):
        writer.write(memoryview(result).cast("B"))
        positions.append(where)
        bits.append(exact)
        error.add(*sums)
        any_change |= changed
    where = np.concatenate(positions) if positions else np.empty(0, np.int64)
    if not any_change and not where.size:
        writer.drop()
        return False
    writer.end(tensor.name, dtype, tensor.shape)
    if where.size:
        writer.add(f"{tensor.name}:residual.positions", "I64", where.astype("<i8"))
        writer.add(f"{tensor.name}:residual.bits", "I32", np.concatenate(bits).astype("<i4"))
    return True


def _bits(tuned: Source, name: str, start: int, stop: int) -> np.ndarray:
    """The bits of some of a fine-tuned parameter's elements, of a float64 one as float32."""
    reader = cast(Dense, tuned.reader(name, ())[0])
    raw = reader.raw[start:stop]
    if reader.entry.dtype == "F64":
        raw = to_float32(raw, "F64")
    return raw.view(np.int32) if raw.dtype == np.float32 else raw


def _residual(tensor: TensorTask, tuned: Source, block: Block, delta: np.ndarray) -> np.ndarray:
    """The positions in a piece where base + delta, rounded to the dtype, is not the fine-tuned value to the bit."""
    assert block.base is not None
    np.add(block.base, delta, out=block.out, dtype=np.float64)
    rounded = np.empty(delta.size, storage(tensor.dtype))
    encode(block.out, tensor.dtype, rounded)
    rounded_bits = rounded.view(np.int32) if tensor.dtype == "F32" else rounded
    return np.flatnonzero(rounded_bits != _bits(tuned, tensor.name, block.start, block.start + delta.size))


def _require_finite(name: str, delta: np.ndarray) -> None:
    if not np.isfinite(delta).all():
        raise ArtifactError(f"the delta of {name} leaves the range of float32", "the two models do not belong together")


def _measure(delta: np.ndarray, stored: np.ndarray, sums: list[float]) -> None:
    off = delta.astype(np.float64) - stored
    sums[0] += float(np.square(delta, dtype=np.float64).sum())
    sums[1] += float(np.square(off).sum())
    sums[2] = max(sums[2], float(np.abs(off).max(initial=0)))


def _write_lowrank(writer: Writer, tensor: TensorTask, rank: int, error: _Error) -> bool:
    delta = deltas(tensor)
    if not delta.any():
        return False
    up, down, _ = factors(delta, rank)
    sums = [0.0, 0.0, 0.0]
    _measure(delta, up @ down, sums)
    error.add(*sums)
    writer.add(f"{tensor.name}:up", "F32", up)
    writer.add(f"{tensor.name}:down", "F32", np.ascontiguousarray(down))
    return True


def _write_sparse(writer: Writer, tensor: TensorTask, density: float, error: _Error) -> bool:
    if not tensor.count:
        return False
    least = float(magnitudes([tensor], [[retained_count(density, tensor.count)]])[0, 0])

    def piece(block: Block) -> tuple[np.ndarray, np.ndarray, list[float]]:
        delta = block.values[0]
        _require_finite(tensor.name, delta)
        where = np.flatnonzero((np.abs(delta) >= least) & (delta != 0))
        stored, sums = np.zeros_like(delta), [0.0, 0.0, 0.0]
        stored[where] = delta[where]
        _measure(delta, stored, sums)
        return where + block.start, delta[where], sums

    parts = tensor.map(piece)
    for _, _, sums in parts:
        error.add(*sums)
    positions = np.concatenate([part[0] for part in parts])
    if not positions.size:
        return False
    writer.add(f"{tensor.name}:positions", "I64", positions.astype("<i8"))
    writer.add(f"{tensor.name}:values", "F32", np.concatenate([part[1] for part in parts]))
    return True
