"""The k-th greatest magnitude, exactly and out of core, of one tensor or of a model.

Mapped files are read once (after Floyd and Rivest 1975, SELECT): a sample gives a bracket for the wanted magnitude, one
pass counts the magnitudes outside the bracket and stores the few inside, and the counts prove whether the wanted one is
among these. If it is not, or for other inputs, two passes count bit patterns: without its sign a float32 is a number of
31 bits in the order of the magnitudes. The first pass counts the upper 15 bits, which gives the bucket (of 32,768) of
the wanted element; the second counts the lower 16 bits within that bucket, which gives its value. The counters take
half a megabyte, whatever the values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from merges.engine import fused, kernels
from merges.engine.fused import MappedInputs
from merges.engine.tensor_task import Block, TensorTask

LANES = 4  # tables that kernels.coarse counts into
RUN = 32  # neighbours that are sampled together, since a cache line of them costs as much as one
SHARE, SAMPLED = 256, 1 << 20  # one element in SHARE is sampled, and at most SAMPLED
MARGIN = 4.0  # standard deviations of a sampled rank; a bracket that misses costs a second pass, not an error
ROOM = 1 << 18  # magnitudes of each row that one piece may store
STORED = 1 << 24  # magnitudes stored in all: 64 MB
BITS = 12  # log2 of the number of bins for selecting among the stored magnitudes
Make = Callable[[Block], np.ndarray]


def magnitudes(tensors: Sequence[TensorTask], ranks: Sequence[Sequence[int]], make: Make | None = None) -> np.ndarray:
    """The magnitudes at `ranks[row]` (1 is the greatest) of each row, over all tensors together: [rows, ranks] float32.

    `make(block)` gives the rows of a piece, [rows, count] float32; by default the inputs. A rank beyond the number of
    elements gives the least magnitude.
    """
    total = sum(tensor.count for tensor in tensors)
    # Ranks that are the same in every row are looked up once.
    wanted, columns = np.unique(np.clip(np.asarray(ranks, np.int64), 1, max(total, 1)), axis=1, return_inverse=True)
    return np.ascontiguousarray(_magnitudes(tensors, wanted, total, make)[:, columns.reshape(-1)])


def _magnitudes(tensors: Sequence[TensorTask], wanted: np.ndarray, total: int, make: Make | None) -> np.ndarray:
    rows_of = make or (lambda block: block.values)
    if len(tensors) == 1 and len(list(tensors[0].chunks())) == 1:
        return _sorted(rows_of(tensors[0].block(0, tensors[0].count)), wanted)
    device = (
        tensors[0].pool.device if make is None and all(tensor.mapped_inputs is not None for tensor in tensors) else None
    )
    if device is not None:
        from merges.engine import gpu
    elif make is None and (bracketed := _bracketed(tensors, wanted, total)) is not None:
        return bracketed
    rows = len(wanted)

    def upper(block: Block, table: np.ndarray) -> None:
        kernels.coarse(rows_of(block).view(np.uint32), table)

    def upper_mapped(inputs: MappedInputs, start: int, stop: int, table: np.ndarray) -> bool:
        return bool(fused.coarse(inputs, start, stop, table))

    on_device = gpu.coarse(tensors, device) if device is not None else None
    counts = (
        _count(tensors, upper, None if make else upper_mapped, (rows, LANES, 1 << 15))
        if on_device is None
        else on_device
    )
    buckets, within = _locate(counts, wanted)
    distinct = [np.unique(row) for row in buckets]
    used = np.array([len(row) for row in distinct])
    most = int(used.max())
    wide = np.zeros((rows, most), np.uint32)
    for row, numbers in enumerate(distinct):
        wide[row, : len(numbers)] = numbers

    def lower(block: Block, table: np.ndarray) -> None:
        kernels.fine(rows_of(block).view(np.uint32), wide, used, table[:, 0])

    def lower_mapped(inputs: MappedInputs, start: int, stop: int, table: np.ndarray) -> bool:
        return bool(fused.fine(inputs, start, stop, wide, used, table[:, 0]))

    on_device = gpu.fine(tensors, distinct, device) if device is not None else None
    fine = (
        _count(tensors, lower, None if make else lower_mapped, (rows, 1, most, 1 << 16))
        if on_device is None
        else on_device
    )
    bits = np.empty(wanted.shape, np.uint32)
    for row in range(rows):
        for column, bucket in enumerate(buckets[row]):
            table = fine[row, int(np.searchsorted(distinct[row], bucket))]
            low, _ = _locate(table[None], within[row : row + 1, column : column + 1])
            bits[row, column] = (int(bucket) << 16) | int(low[0, 0])
    return bits.view(np.float32)


def _bracketed(tensors: Sequence[TensorTask], wanted: np.ndarray, total: int) -> np.ndarray | None:
    """`magnitudes` in one pass, for tensors in mapped files; None if the sampled bracket fails."""
    mapped = [tensor.mapped_inputs for tensor in tensors if tensor.mapped_inputs is not None]
    if len(mapped) < len(tensors):
        return None
    pool = tensors[0].pool
    lows, highs, share = _brackets(tensors, wanted, total)
    if share * total > STORED:
        return None

    def group(inputs: MappedInputs, start: int, stop: int) -> tuple[np.ndarray, list[np.ndarray]] | None:
        counts = np.zeros((*wanted.shape, 4), np.int64)
        # Space for one tile more than may be stored, since a tile is only read while that much is free.
        room = pool.buffer("stored", (*wanted.shape, min(ROOM, stop - start) + kernels.TILE), np.float32)
        if not fused.split(inputs, start, stop, lows, highs, counts, room):
            return None
        return counts, [room[where][: counts[where][3]].copy() for where in np.ndindex(*wanted.shape)]

    pieces = ((inputs, *piece) for tensor, inputs in zip(tensors, mapped, strict=True) for piece in tensor.groups())
    parts = pool.map(group, pieces)
    splits = [part for part in parts if part is not None]
    if len(splits) < len(parts):
        return None
    counts = np.sum([part for part, _ in splits], axis=0)
    chosen = np.empty(wanted.shape, np.float32)
    for number, where in enumerate(np.ndindex(*wanted.shape)):
        rank, (above, from_high, from_low, inside) = wanted[where], counts[where]
        if not above < rank <= from_low:
            return None
        if rank <= from_high:
            chosen[where] = highs[where]
        elif rank > from_high + inside:
            chosen[where] = lows[where]
        else:
            chosen[where] = _ranked(
                np.concatenate([magnitudes_within[number] for _, magnitudes_within in splits]), rank - from_high
            )
    return chosen


def _ranked(values: np.ndarray, rank: int) -> np.float32:
    """The `rank`-th greatest of some magnitudes; only those in its bin are sorted, not all."""
    bits = values.view(np.uint32)
    least = bits.min()
    shift = np.uint32(max(int(bits.max() - least).bit_length() - BITS, 0))
    counts = np.zeros(1 << BITS, np.int64)
    kernels.bins(bits, least, shift, counts)
    where, within = kernels.locate(counts, rank)
    candidates = np.empty(counts[where] + 1, np.uint32)
    kernels.gather(bits, least, shift, where, candidates)
    candidates[:-1].sort()
    return candidates[-1 - within : -within].view(np.float32)[0]


def _brackets(tensors: Sequence[TensorTask], wanted: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Brackets for the wanted magnitudes from a sample: lower ends, upper ends, share of elements inside."""
    draw = np.random.default_rng(0)
    runs = max(min(total // SHARE, SAMPLED) // RUN, 64)
    parts = []
    for tensor in tensors:
        share_of_runs = min(round(runs * tensor.count / total), tensor.count // RUN)
        # One run at a random position in each of equal segments: at even distances all could be of one column.
        edges = np.linspace(0, tensor.count, share_of_runs + 1).astype(np.int64)
        starts = edges[:-1] + (draw.random(share_of_runs) * (np.diff(edges) - RUN + 1)).astype(np.int64)
        values = np.empty((len(wanted), share_of_runs * RUN), np.float32)
        assert tensor.mapped_inputs is not None
        fused.sample(tensor.mapped_inputs, starts, RUN, values)
        parts.append(np.abs(values, out=values))
    rows = np.concatenate(parts, axis=1)
    size, share = rows.shape[1], 0.0
    lows, highs = np.zeros(wanted.shape, np.float32), np.full(wanted.shape, np.inf, np.float32)
    if not size:  # many small tensors: everything is stored
        return lows, highs, 1.0
    for where in np.ndindex(*wanted.shape):
        middle, row = size * wanted[where] / total, rows[where[0]]
        # Neighbours are correlated, so the standard deviation is estimated from runs, not from single elements.
        center = size - 1 - min(int(middle), size - 1)
        value = np.partition(row, center)[center]
        spread = max(float(part.reshape(-1, RUN).sum(axis=1).std()) for part in (row >= value, row > value))
        margin = MARGIN * spread * (size / RUN) ** 0.5 + RUN
        upper, lower = int(middle - margin), int(middle + margin) + 1  # counted from the greatest
        bounds = [size - 1 - rank for rank in (lower, upper) if 0 <= rank < size]
        ordered = np.partition(row, bounds) if bounds else row
        if lower < size:
            lows[where] = ordered[size - 1 - lower]
        if upper >= 0:
            highs[where] = ordered[size - 1 - upper]
        share += min((lower - upper) / size, 1.0)
    return lows, highs, share


def _sorted(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`magnitudes` for rows that fit into one piece."""
    # Sorted, because NumPy's partition is slow with many equal values, as in deltas of bfloat16.
    ordered = np.sort(np.abs(values), axis=1)
    return np.take_along_axis(ordered, values.shape[1] - wanted, axis=1)


def _locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bins of the elements of these ranks (1 is the greatest), and their ranks within the bins."""
    bins, within = np.empty_like(ranks), np.empty_like(ranks)
    for row in range(len(ranks)):
        for column in range(ranks.shape[1]):
            bins[row, column], within[row, column] = kernels.locate(counts[row], ranks[row, column])
    return bins, within


def _count(
    tensors: Sequence[TensorTask],
    function: Callable[[Block, np.ndarray], None],
    mapped: Callable[[MappedInputs, int, int, np.ndarray], bool] | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """The sum of the tables, [rows, ...], in which `function(block, table)` counts every piece; one table per thread.

    A table is [rows, lanes, ...], and the lanes are summed too. `mapped` counts data in mapped files in place; if it
    returns False a number is not finite, and the piece is read again to report it.
    """
    pool = tensors[0].pool
    # int32 where that suffices: tables that fit into a core's cache are much faster.
    width = np.int32 if sum(tensor.count for tensor in tensors) < 1 << 31 else np.int64
    tables: dict[int, np.ndarray] = {}

    def group(tensor: TensorTask, start: int, stop: int) -> None:
        thread = threading.get_ident()
        if thread not in tables:
            tables[thread] = pool.zeroed(shape, width)
        if mapped and tensor.mapped_inputs and mapped(tensor.mapped_inputs, start, stop, tables[thread]):
            return
        for chunk in tensor.chunks(start, stop):
            function(tensor.block(*chunk), tables[thread])

    pool.map(group, ((tensor, *piece) for tensor in tensors for piece in tensor.groups()))
    total = np.zeros((shape[0], *shape[2:]), np.int64)
    for table in tables.values():
        kernels.add_tables(table.reshape(shape[0], shape[1], -1), total.reshape(shape[0], -1))
        pool.give_back(table)
    return total
