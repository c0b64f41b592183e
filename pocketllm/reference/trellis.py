"""Trellis codes: the best bits of a matrix, and the levels that bits stand for.

A weight's first bit enters a register of ``MEMORY`` bits that runs down the column. Parities of the
window, which has the register above the bit, choose one of eight subsets of the levels; the further
bits choose a level of the subset.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEMORY = 8
STATES = 1 << MEMORY
TAPS = (0x98, 0x56, 0x1B1)
SEGMENT = 256
SHORT = 16
OVERLAP = 48

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def encode_trellis(
    x: Floats,
    weight: Floats,
    feedback: Floats | None,
    bits: Bytes,
    extra: int,
    factor: Floats,
    level: Floats,
) -> Bytes:
    """Twin of :func:`pocketllm.kernels.encode_trellis`, with the same bits."""
    error = x.copy()
    symbol = np.zeros(x.shape, np.uint8)
    for c in range(x.shape[1]):
        total = np.zeros(len(x), np.float32)
        for m in range(c if feedback is not None else 0):
            assert feedback is not None
            total = _fma(error[:, m], feedback[m, c], total)
        if bits[c] == 0:
            continue
        with np.errstate(all="ignore"):
            target = (x[:, c] + total) / factor[c]
            for rows in _segments(len(x)):
                row_bits = _row_bits(int(bits[c]), extra, len(x))[rows]
                symbol[rows, c] = _encode(target[rows], weight[rows], row_bits, level)
            own = slice(c, c + 1)
            decoded = trellis_levels(symbol[:, own], bits[own], extra, level)[:, 0]
            error[:, c] = x[:, c] - factor[c] * decoded
    return symbol


def trellis_levels(symbol: Bytes, bits: Bytes, extra: int, level: Floats) -> Floats:
    """The levels that symbols stand for; zero in columns without bits.

    Args:
        symbol: uint8 (rows, columns), as of :func:`encode_trellis`.
        bits: uint8 (columns,) bits of a weight, but for the richer rows.
        extra: of four rows so many have a bit more, 0..3.
        level: (252,) magnitudes of 1 to 6 bits.

    Returns:
        float32 (rows, columns).
    """
    values = np.zeros(symbol.shape, np.float32)
    for c, count in enumerate(bits):
        for rows in _segments(len(symbol)) if count else []:
            own, first = symbol[rows, c], symbol[rows, c] & 1
            before = first[-MEMORY:] if len(own) >= SHORT else np.zeros(MEMORY, np.uint8)
            path = np.concatenate([before, first]).astype(np.int64)
            window = sum(path[MEMORY - i : len(path) - i] << i for i in range(MEMORY + 1))
            subset = _subset(np.asarray(window))
            row_bits = _row_bits(int(count), extra, len(symbol))[rows]
            for k in np.unique(row_bits):
                here = row_bits == k
                levels = _level_table(int(k), level)
                values[rows, c][here] = levels[own[here] >> 1, subset[here]]
    return values


def _subset(window: Ints) -> Ints:
    """The parities of windows: 0..7."""
    subset = np.zeros_like(window)
    for i, tap in enumerate(TAPS):
        for bit in range(MEMORY + 1):
            subset ^= (window & tap) >> bit << i & 1 << i
    return subset


def _segments(rows: int) -> list[slice]:
    """Rows of each segment; the last has those left over, too."""
    starts = list(range(0, rows - SEGMENT + 1, SEGMENT)) or [0][:rows]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], rows], strict=False)]


def _row_bits(bits: int, extra: int, rows: int) -> Ints:
    """Bits of each row of a column that has any."""
    row = np.arange(rows)
    return bits + (row + 1) * extra // 4 - row * extra // 4


def _level_table(bits: int, level: Floats) -> Floats:
    """Levels of a weight of ``bits`` bits: (2**(bits - 1), 8), further bits and subset."""
    first, count = (4 << (bits - 1)) - 4, 2 << bits
    magnitude = level[first : first + count]
    return np.concatenate([magnitude, -magnitude[::-1]]).reshape(-1, 1 << len(TAPS))


def _fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """``a * b + c``, rounded once.

    The product is exact in float64. The sum is rounded to odd there, which leaves so many more bits
    than float32 has that rounding again gives what rounding once would.
    """
    product, other = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    with np.errstate(all="ignore"):
        total = product + other
        rest = total - product
        error = (product - (total - rest)) + (other - rest)
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        is_even = total.view(np.int64) % 2 == 0
        return np.where((error != 0) & is_even, odd, total).astype(np.float32)


def _encode(target: Floats, weight: Floats, bits: Ints, level: Floats) -> Bytes:
    """Symbols of a segment of a column, (n,)."""
    n = len(target)
    metric = np.zeros((n, 1 << len(TAPS)), np.float32)
    nearest = np.zeros(metric.shape, np.int64)
    for r in range(n):
        squares = (target[r] - _level_table(int(bits[r]), level)) ** 2
        squares[np.isnan(squares)] = np.inf
        nearest[r] = squares.argmin(0)
        metric[r] = weight[r] * squares.min(0)
    metric[np.isnan(metric)] = np.inf
    start = 0
    if n >= SHORT:
        length = min(OVERLAP, n // 2)
        around = np.concatenate([metric[n - length :], metric[:length]])
        cost, survivors = _run(np.zeros(STATES, np.float32), around)
        start = _trace_back(survivors[length:], int(cost.argmin()))[0]
    only = np.full(STATES, np.inf, np.float32)
    only[start] = 0.0
    cost, survivors = _run(only, metric)
    end = start if n >= SHORT else int(cost.argmin())
    states = np.array(_trace_back(survivors, end))
    subset = _subset((states[:-1] << 1) | (states[1:] & 1))
    further = nearest[np.arange(n), subset]
    return (states[1:] & 1 | further << 1).astype(np.uint8)


def _run(cost: Floats, metric: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """The cheapest paths to every state through rows of metrics, (n, 8), after costs (256,).

    Returns:
        their costs (256,), and (n, 256): where the path from the upper of two states survives.
    """
    state = np.arange(STATES)
    lower, upper = state >> 1, (state >> 1) + STATES // 2
    from_lower, from_upper = _subset(state), _subset(state + STATES)
    survivors = np.zeros((len(metric), STATES), bool)
    for r, row in enumerate(metric):
        first, second = cost[lower] + row[from_lower], cost[upper] + row[from_upper]
        survivors[r] = second < first
        cost = np.where(survivors[r], second, first)
    return cost, survivors


def _trace_back(survivors: NDArray[np.bool_], end: int) -> list[int]:
    """The states before, between and after the rows of the path that leads to ``end``."""
    states = [end]
    for row in survivors[::-1]:
        states.append(states[-1] >> 1 | (STATES // 2 if row[states[-1]] else 0))
    return states[::-1]
