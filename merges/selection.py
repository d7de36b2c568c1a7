"""The k-th greatest magnitude, exactly and out of core: by counting bit patterns, without sorting or sampling.

Without its sign a float32 is a number of 31 bits whose order is that of the magnitudes. A first pass counts the upper
15 bits, which tells in which of 32,768 buckets the wanted element lies; a second counts the lower 16 bits within that
bucket, which tells its value. Two passes over the data and half a megabyte of counters, for one tensor or for a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from merges import fused, kernels

if TYPE_CHECKING:
    from merges.fused import Direct
    from merges.tensor import Block, Tensor

LANES = 4  # tables that kernels.coarse counts into
Make = Callable[["Block"], np.ndarray]


def magnitudes(tensors: Sequence[Tensor], ranks: Sequence[Sequence[int]], make: Make | None = None) -> np.ndarray:
    """The magnitudes at `ranks[row]` (1 is the greatest) of each row, over all tensors together: [rows, ranks] float32.

    A rank beyond the number of elements gives the least magnitude.
    """
    rows_of = make or (lambda block: block.values)
    total = sum(tensor.count for tensor in tensors)
    wanted = np.clip(np.asarray(ranks, np.int64), 1, max(total, 1))
    if len(tensors) == 1 and len(list(tensors[0].chunks())) == 1:
        return _sorted(rows_of(tensors[0].block(0, tensors[0].count)), wanted)
    rows = len(wanted)

    def upper(block: Block, table: np.ndarray) -> None:
        kernels.coarse(rows_of(block).view(np.uint32), table)

    def upper_direct(direct: Direct, start: int, stop: int, table: np.ndarray) -> bool:
        return bool(fused.coarse(*direct, start, stop, table))

    counts = _count(tensors, upper, None if make else upper_direct, (rows, LANES, 1 << 15))
    buckets, within = _locate(counts, wanted)
    distinct = [np.unique(row) for row in buckets]
    used = np.array([len(row) for row in distinct])
    most = int(used.max())
    wide = np.zeros((rows, most), np.uint32)
    for row, found in enumerate(distinct):
        wide[row, : len(found)] = found

    def lower(block: Block, table: np.ndarray) -> None:
        kernels.fine(rows_of(block).view(np.uint32), wide, used, table[:, 0])

    def lower_direct(direct: Direct, start: int, stop: int, table: np.ndarray) -> bool:
        return bool(fused.fine(*direct, start, stop, wide, used, table[:, 0]))

    fine = _count(tensors, lower, None if make else lower_direct, (rows, 1, most, 1 << 16))
    bits = np.empty(wanted.shape, np.uint32)
    for row in range(rows):
        for column, bucket in enumerate(buckets[row]):
            table = fine[row, int(np.searchsorted(distinct[row], bucket))]
            low, _ = _locate(table[None], within[row : row + 1, column : column + 1])
            bits[row, column] = (int(bucket) << 16) | int(low[0, 0])
    return bits.view(np.float32)


def _sorted(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The same for what fits into one piece."""
    size = values.shape[1]
    found = np.empty(wanted.shape, np.float32)
    for row, magnitude in enumerate(np.abs(values)):
        places = size - wanted[row]
        found[row] = np.partition(magnitude, sorted(set(places.tolist())))[places]
    return found


def _locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the elements of these ranks lie, counted from the greatest: the bins, and the ranks within them."""
    bins, within = np.empty_like(ranks), np.empty_like(ranks)
    for row in range(len(ranks)):
        for column in range(ranks.shape[1]):
            bins[row, column], within[row, column] = kernels.locate(counts[row], ranks[row, column])
    return bins, within


def _count(
    tensors: Sequence[Tensor],
    function: Callable[[Block, np.ndarray], None],
    direct: Callable[[Direct, int, int, np.ndarray], bool] | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Let `function(block, table)` count every piece, each thread in a table of its own; the tables' sum, [rows, ...].

    A table is [rows, lanes, ...], and the lanes are summed too. `direct` counts what lies in mapped files where it is;
    what it answers False to holds a number that is not finite, and is read once more, which names it.
    """
    pool = tensors[0].pool
    # Half as wide where that suffices: tables that stay in a core's cache are counted into much faster.
    width = np.int32 if sum(tensor.count for tensor in tensors) < 1 << 31 else np.int64
    tables: dict[int, np.ndarray] = {}

    def group(tensor: Tensor, start: int, stop: int) -> None:
        thread = threading.get_ident()
        if thread not in tables:
            tables[thread] = pool.zeroed(shape, width)
        if direct and tensor.direct and direct(tensor.direct, start, stop, tables[thread]):
            return
        for chunk in tensor.chunks(start, stop):
            function(tensor.block(*chunk), tables[thread])

    pool.map(group, ((tensor, *piece) for tensor in tensors for piece in tensor.groups()))
    total = np.zeros((shape[0], *shape[2:]), np.int64)
    for table in tables.values():
        kernels.fold(table.reshape(shape[0], shape[1], -1), total.reshape(shape[0], -1))
        pool.give_back(table)
    return total
