"""The inner loops: float32 in, float64 arithmetic, one thread each; the engine runs them side by side on all cores.

`values` is always [inputs, elements] float32, `weights` [inputs] float64, `out` [elements] float64. Nothing is
reassociated (no fastmath), so a result depends on the order of the inputs alone, never on the machine or its threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from merges.engine.floats import OPTIONS

MAGNITUDE = np.uint32(0x7FFFFFFF)  # the bits of a float32 without its sign, which are in the order of the magnitudes
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the increment of SplitMix64
LOWER, TOP = np.uint64(0xFFFFFFFF), np.uint64(63)  # the lower half of 64 bits; the shift that leaves the highest bit
LANES = 8  # running sums of `gram`
TILE = 512  # elements: those of four inputs, and their sums, fit into the first-level cache


@njit(**OPTIONS)
def subtract(values, base):  # type: ignore[no-untyped-def]
    """values -= base in every row, in float32: the difference of two float32 numbers, rounded once."""
    for m in range(values.shape[0]):
        for i in range(values.shape[1]):
            values[m, i] -= base[i]


@njit(**OPTIONS)
def add(out, base):  # type: ignore[no-untyped-def]
    """out += base."""
    for i in range(out.size):
        out[i] += base[i]


@njit(**OPTIONS)
def weighted_sum(values, weights, out):  # type: ignore[no-untyped-def]
    """out = sum over inputs of weight * value."""
    for low in range(0, out.size, TILE):
        part = out[low : low + TILE]
        first, weight = values[0, low : low + TILE], weights[0]
        for i in range(part.size):
            part[i] = weight * first[i]
        for m in range(1, values.shape[0]):
            row, weight = values[m, low : low + TILE], weights[m]
            for i in range(part.size):
                part[i] += weight * row[i]


@njit(**OPTIONS)
def trim(values, low, high):  # type: ignore[no-untyped-def]
    """Set to zero, in place, the values whose magnitude is below `low` or above `high` ([inputs], float32)."""
    for m in range(values.shape[0]):
        least, most = low[m], high[m]
        for i in range(values.shape[1]):
            # A value is stored in both cases, so that the loop becomes vector instructions.
            value = values[m, i]
            values[m, i] = value if abs(value) >= least and abs(value) <= most else np.float32(0)


@njit(**OPTIONS)
def sign_or_plus(votes):  # type: ignore[no-untyped-def]
    """The sign of a sum of votes as 1 or -1, and 1 where they cancel."""
    return -1.0 if votes < 0 else 1.0


@njit(**OPTIONS)
def agreeing_weight(value, sign, weight):  # type: ignore[no-untyped-def]
    """The weight of a value in the disjoint mean: `weight` if the value agrees with the elected sign, else 0."""
    return weight if value * sign > 0 else 0.0


@njit(**OPTIONS)
def disjoint_mean(total, mass):  # type: ignore[no-untyped-def]
    """The weighted mean of the values that agree; where none does, `total` is 0, and so is the mean."""
    return total / (mass if mass > 0 else 1.0)


@njit(**OPTIONS)
def elect(values, factors, votes, weights, mean, positive, out):  # type: ignore[no-untyped-def]
    """Elect a sign for each element, and combine the values (times their input's factor) that agree with it.

    As steps.elect_signs, then steps.disjoint_mean. The sign is that of sum(vote * factor * value); where that is zero
    none is elected, or + if `positive`. With `mean` the weighted sum of the agreeing values is divided by their
    total weight.
    """
    models, count = values.shape
    mass, sign = np.empty(TILE, np.float64), np.empty(TILE, np.float64)
    for low in range(0, count, TILE):
        # Slices, so that the compiler sees indices in range and makes vector instructions of the loops.
        part = out[low : low + TILE]
        size = part.size
        for i in range(size):
            mass[i] = 0.0
            sign[i] = 0.0
            part[i] = 0.0
        for m in range(models):
            row, vote, factor = values[m, low : low + TILE], votes[m], factors[m]
            for i in range(size):
                sign[i] += vote * (factor * row[i])
        if positive:
            for i in range(size):
                sign[i] = sign_or_plus(sign[i])
        for m in range(models):
            row, weight = values[m, low : low + TILE], weights[m]
            # A negative weight adds the negated vector, so the negated value is compared with the sign.
            weight_size, signed_factor = abs(weight), factors[m] * (np.float64(weight > 0) - np.float64(weight < 0))
            for i in range(size):
                value = signed_factor * row[i]
                share = agreeing_weight(value, sign[i], weight_size)
                part[i] += share * value
                mass[i] += share
        if mean:
            for i in range(size):
                part[i] = disjoint_mean(part[i], mass[i])


@njit(**OPTIONS)
def elect_few(rows, vote_factors, signed_factors, weight_sizes, mean, positive, out):  # type: ignore[no-untyped-def]
    """The same as `elect` for a whole tile of a few inputs; intermediate results stay in registers.

    `rows` is [inputs * TILE] float32, `out` [TILE]. The numbers of the inputs are tuples, whose length is known when
    this is compiled, so that the loops over inputs are unrolled: `vote_factors` are vote * factor; `signed_factors` the
    factors with the weights' signs, or None where they equal `vote_factors`; `weight_sizes` the weights without their
    signs, or None where all are 1.
    """
    for i in range(TILE):
        sign = 0.0
        for m in range(len(vote_factors)):
            sign += vote_factors[m] * rows[np.uint64(m * TILE + i)]
        if positive:
            sign = sign_or_plus(sign)
        total, mass = 0.0, 0.0
        for m in range(len(vote_factors)):
            value = (vote_factors[m] if signed_factors is None else signed_factors[m]) * rows[np.uint64(m * TILE + i)]
            share = agreeing_weight(value, sign, 1.0 if weight_sizes is None else weight_sizes[m])
            total += share * value
            mass += share
        if mean:
            total = disjoint_mean(total, mass)
        out[i] = total


@njit(**OPTIONS)
def weighted_sum_few(rows, weights, out):  # type: ignore[no-untyped-def]
    """The same as `weighted_sum` for a whole tile of a few inputs, as in `elect_few`."""
    for i in range(TILE):
        total = weights[0] * rows[i]
        for m in range(1, len(weights)):
            total += weights[m] * rows[np.uint64(m * TILE + i)]
        out[i] = total


@njit(**OPTIONS)
def gram(values, out):  # type: ignore[no-untyped-def]
    """out[a, b] = sum of values[a] * values[b]; eight running sums each, in a fixed order."""
    models, count = values.shape
    sums = np.empty(LANES, np.float64)
    whole = count - count % LANES
    for a in range(models):
        for b in range(a + 1):
            for lane in range(LANES):
                sums[lane] = 0.0
            for i in range(0, whole, LANES):
                for lane in range(LANES):
                    sums[lane] += np.float64(values[a, i + lane]) * np.float64(values[b, i + lane])
            total = 0.0
            for lane in range(LANES):
                total += sums[lane]
            for i in range(whole, count):
                total += np.float64(values[a, i]) * np.float64(values[b, i])
            out[a, b] = out[b, a] = total


@njit(**OPTIONS)
def coarse(bits, tables):  # type: ignore[no-untyped-def]
    """Count the magnitudes of each row by the upper 15 bits of their 31: tables is [rows, 4, 32768].

    Neighbouring elements often fall into one bin; with four tables an increment does not wait for the one before.
    """
    for m in range(bits.shape[0]):
        row, counts = bits[m], tables[m]
        whole = row.size - row.size % 4
        for i in range(0, whole, 4):
            counts[0, (row[i] & MAGNITUDE) >> np.uint32(16)] += 1
            counts[1, (row[i + 1] & MAGNITUDE) >> np.uint32(16)] += 1
            counts[2, (row[i + 2] & MAGNITUDE) >> np.uint32(16)] += 1
            counts[3, (row[i + 3] & MAGNITUDE) >> np.uint32(16)] += 1
        for i in range(whole, row.size):
            counts[0, (row[i] & MAGNITUDE) >> np.uint32(16)] += 1


@njit(**OPTIONS)
def _fine(row, bucket, counts):  # type: ignore[no-untyped-def]
    for i in range(row.size):
        magnitude = row[i] & MAGNITUDE
        if magnitude >> np.uint32(16) == bucket:
            counts[magnitude & np.uint32(0xFFFF)] += 1


@njit(**OPTIONS)
def fine(bits, buckets, used, tables):  # type: ignore[no-untyped-def]
    """Count the magnitudes of each row whose upper bits are one of its buckets, by their lower 16 bits.

    `buckets` is [rows, most] uint32, of which the first `used[row]` are valid; tables is [rows, most, 65536]. Few
    elements lie in a bucket, so 64 at a time are tested first, by vector instructions.
    """
    for m in range(bits.shape[0]):
        for column in range(used[m]):
            bucket, counts = buckets[m, column], tables[m, column]
            for low in range(0, bits.shape[1], 64):
                part = bits[m, low : low + 64]
                hits = 0
                for i in range(part.size):
                    hits += 1 if (part[i] & MAGNITUDE) >> np.uint32(16) == bucket else 0
                if hits:
                    _fine(part, bucket, counts)


@njit(**OPTIONS)
def split(values, lows, highs, flags, marked, counts, within):  # type: ignore[no-untyped-def]
    """Count the magnitudes of each row above both ends of its brackets, and store those strictly inside a bracket.

    `lows` and `highs` are [rows, brackets] float32, `within` [rows, brackets, room] float32, where the magnitudes are
    stored; `counts` [rows, brackets, 4] int64: how many are above `high`, at least `high`, at least `low`, and how many
    are stored. Few are inside, so eight elements without any are skipped at once. Returns False when the room is used
    up. Scratch space: `flags` [elements, rounded up to a multiple of 8] uint8, zeros, and `marked` [an eighth of that,
    plus 1] int64.
    """
    size, words = values.shape[1], flags.view(np.uint64)
    for m in range(values.shape[0]):
        row = values[m]
        for column in range(lows.shape[1]):
            low, high, count, stored = lows[m, column], highs[m, column], counts[m, column], within[m, column]
            filled = count[3]
            if filled + flags.size > stored.size:
                return False
            above, from_high, from_low = np.int32(0), np.int32(0), np.int32(0)
            for i in range(size):
                magnitude = abs(row[i])
                above = np.int32(above + np.int32(magnitude > high))
                from_high = np.int32(from_high + np.int32(magnitude >= high))
                from_low = np.int32(from_low + np.int32(magnitude >= low))
                flags[i] = np.uint8(magnitude > low) & np.uint8(magnitude < high)
            count[0] += above
            count[1] += from_high
            count[2] += from_low
            # A magnitude outside is overwritten by the next one: a branch that can't be predicted would cost more.
            marks = 0
            for word in range(words.size):
                marked[marks] = word
                marks += 1 if words[word] != 0 else 0
            for number in range(marks):
                first = 8 * marked[number]
                for i in range(first, min(first + 8, size)):
                    stored[filled] = abs(row[i])
                    filled += np.int64(flags[i])
            count[3] = filled
    return True


@njit(**OPTIONS)
def bins(bits, least, shift, counts):  # type: ignore[no-untyped-def]
    """counts[(bits - least) >> shift] += 1 for each element of `bits`."""
    for i in range(bits.size):
        counts[np.uint32(bits[i] - least) >> shift] += 1


@njit(**OPTIONS)
def gather(bits, least, shift, number, out):  # type: ignore[no-untyped-def]
    """Copy to `out` the elements that `bins` counts in bin `number`; `out` has room for one more."""
    filled = 0
    for i in range(bits.size):
        # An element of another bin is overwritten by the next one.
        out[filled] = bits[i]
        filled += 1 if np.uint32(bits[i] - least) >> shift == number else 0


@njit(**OPTIONS)
def add_tables(tables, total):  # type: ignore[no-untyped-def]
    """total[row] += the sum of tables[row] over its lanes; the tables are set to zero, for the next count."""
    for row in range(tables.shape[0]):
        for lane in range(tables.shape[1]):
            for i in range(tables.shape[2]):
                total[row, i] += tables[row, lane, i]
                tables[row, lane, i] = 0


@njit(**OPTIONS)
def locate(counts, rank):  # type: ignore[no-untyped-def]
    """The bin that holds the element of this rank (1 is the greatest), and its rank within the bin."""
    above = 0
    for number in range(counts.size - 1, -1, -1):
        if above + counts[number] >= rank:
            return number, rank - above
        above += counts[number]
    return 0, rank - above


@njit(**OPTIONS)
def mix(x):  # type: ignore[no-untyped-def]
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): 64 pseudo-random bits from a 64-bit state."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(**OPTIONS)
def drop(values, keys, keep, start):  # type: ignore[no-untyped-def]
    """Keep each value with probability `keep[m]`, else set it to zero, in place: a Bernoulli mask.

    The random number of 32 bits depends on the key and the index `start + i` alone. One call of `mix` gives those of
    two neighbours, the lower half for the even index.
    """
    count = values.shape[1]
    lead = min(start & 1, count)
    pairs = (count - lead) // 2
    for m in range(values.shape[0]):
        # The bits times 1 or 0, the sign of a difference: a branch that can't be predicted would cost more.
        row, key = values[m].view(np.uint32), keys[m]
        below = np.uint64(np.ceil(keep[m] * 4294967296.0))
        if lead:
            row[0] *= np.uint32(((mix(key + np.uint64(start // 2 + 1) * GOLDEN) >> np.uint64(32)) - below) >> TOP)
        word = np.uint64((start + lead) // 2 + 1)
        for i in range(pairs):
            bits = mix(key + (word + np.uint64(i)) * GOLDEN)
            row[lead + 2 * i] *= np.uint32(((bits & LOWER) - below) >> TOP)
            row[lead + 2 * i + 1] *= np.uint32(((bits >> np.uint64(32)) - below) >> TOP)
        if lead + 2 * pairs < count:
            row[count - 1] *= np.uint32(((mix(key + (word + np.uint64(pairs)) * GOLDEN) & LOWER) - below) >> TOP)


@njit(**OPTIONS)
def l1_norms(values, out):  # type: ignore[no-untyped-def]
    """out[m] = sum of the magnitudes of values[m]."""
    for m in range(values.shape[0]):
        total = 0.0
        for i in range(values.shape[1]):
            total += abs(np.float64(values[m, i]))
        out[m] = total
