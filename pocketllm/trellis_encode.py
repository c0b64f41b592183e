"""From a matrix to trellis codes: levels, bits and scales of columns, and the choice itself.

Columns are chosen one after the other, those with the largest input mass first; the error of each
is fed into the targets of the others through the LDLᵀ factors of H, as in :mod:`pocketllm.encode`,
in blocks of one column. Given these targets the best codes of a column are found exactly, by the
Viterbi algorithm, so that nothing is won by choosing again.

What a column's error costs is its diagonal entry D of the factors. Where inputs differ as those of
a down projection do, the same bits for all columns waste them: with bits b_c the cost is the sum of
D_c v_c 2^(-2 b_c), v_c the mean square of the column's target, and is least where all terms are
alike. Targets have the mean square of the weights, and of the errors that are fed into them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable

import numpy as np

from . import kernels, rowcode, trellis
from .encode import Factors, squares_of
from .layout import cut
from .trellis_bits import ERRORS, expected_error, share_bits

# Levels are fitted in so many turns to so many weights at most, in columns of so many rows.
FIT_TURNS, FIT_WEIGHTS, FIT_ROWS = 8, 2**16, 1024
# The largest magnitudes of 1, 2, ... bits that are made. Finer steps than these err no less up to 3
# bits, by half a percent at 4, and products of such levels can be added up in pairs on AVX2.
FINEST = [31, 31, 63, 63, 127, 127]
# Times bits are given to columns, each time for the targets that the last bits lead to.
BITS_TURNS = 3
# Rows of the feedback that are squared together.
TOGETHER = 64
# The most that errors fed back may add to the mean square of a matrix's targets.
MOST_GAIN = 4.0


# ---- levels -----------------------------------------------------------------------------------


def fit_magnitudes(sample: np.ndarray) -> dict[str, np.ndarray]:
    """The levels of 1 to 6 bits, by Lloyd's iterations, as the file stores them.

    Args:
        sample: (rows, columns) float32 of variance 1; its columns are coded.

    Returns:
        ``magnitude`` int8 (252,) and ``magnitude_scale`` float32 (6,).
    """
    magnitude = np.zeros(trellis.MAGNITUDES, np.int8)
    scale = np.ones(trellis.MAX_BITS, np.float32)
    for bits in range(1, trellis.MAX_BITS + 1):
        own = trellis.TABLE[bits - 1]
        levels = _fitted(sample, bits)
        scale[bits - 1] = levels.max() / FINEST[bits - 1]
        magnitude[own] = np.rint(levels / scale[bits - 1])
    return {"magnitude": magnitude, "magnitude_scale": scale}


def _fitted(sample: np.ndarray, bits: int) -> np.ndarray:
    """Magnitudes of ``bits`` bits, (2^(bits+1),) float64."""
    half = 2 << bits
    normal = statistics.NormalDist()
    places = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    levels = np.minimum(1.45 * np.array(places), 3.3)
    rows, columns = sample.shape
    weight, factor = np.ones(rows, np.float32), np.ones(columns, np.float32)
    table = np.zeros(trellis.MAGNITUDES, np.float32)
    each = np.full(columns, bits, np.uint8)
    for _ in range(FIT_TURNS):
        table[trellis.TABLE[bits - 1]] = levels
        symbol = kernels.encode_trellis(sample, weight, None, each, 0, factor, table)
        place, sign = trellis.signed_magnitude(trellis.level_index(symbol), bits)
        sums = np.bincount(place.ravel(), (sign * sample).ravel().astype(np.float64), half)
        counts = np.bincount(place.ravel(), minlength=half)
        levels = np.where(counts > 0, np.maximum(sums, 0) / np.maximum(counts, 1), levels)
    return levels


def level_table(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The levels that a file's magnitudes stand for, float32 (252,)."""
    sizes = [own.stop - own.start for own in trellis.TABLE]
    return parts["magnitude"].astype(np.float32) * np.repeat(parts["magnitude_scale"], sizes)


# ---- bits and scales --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a matrix's columns are coded.

    Attributes:
        bits: of the weights, or of each block.
        order: (in,) int64, the column that is chosen first, second, ...
        column_bits: (in,) int64, k of each column; of a row without a bit more.
        codes: uint8 (in,), where blocks have bits of their own; else None.
        gain: the root mean square of targets, which row scales take.
    """

    bits: trellis.Bits
    order: np.ndarray
    column_bits: np.ndarray
    codes: np.ndarray | None
    gain: float


def uniform_coding(bits: float, energy: np.ndarray, factors: Factors | None) -> Coding:
    """The same bits for every column.

    Args:
        bits: a multiple of 1/4.
        energy: (in,) mean square of each column's normalised weights.
        factors: of H, in blocks of one column.
    """
    columns = len(energy)
    each = np.full(columns, int(bits), np.int64)
    if factors is None:
        return Coding(bits, np.arange(columns), each, None, 1.0)
    cost = factors.metric[:, 0, 0].astype(np.float64)
    cost /= cost.sum()
    fed = _fed_back(factors.feedback, np.ones(columns)) @ cost
    gain = (energy[factors.order] @ cost) / max(1 - expected_error(bits) * fed, 1 / MOST_GAIN)
    return Coding(bits, factors.order, each, None, float(np.sqrt(gain)))


def column_coding(
    row_bytes: int, energy: np.ndarray, cost: np.ndarray, factors: Factors | None
) -> Coding:
    """Bits for each block of columns, and a scale for each column.

    Args:
        row_bytes: the most that a row may take.
        energy: (in,) mean square of each column's normalised weights.
        cost: (in,) what an error in a column costs, where there are no factors.
        factors: of H, in blocks of one column.
    """
    order = np.arange(len(energy)) if factors is None else factors.order
    if factors is not None:
        cost = np.empty(len(energy))
        cost[order] = factors.metric[:, 0, 0]
    variance = np.maximum(energy, 1e-12)
    for _ in range(BITS_TURNS):
        ranked = np.argsort(-cost * variance, kind="stable")
        blocks = share_bits((cost * variance)[ranked], row_bytes)
        bits = np.empty(len(energy), np.int64)
        bits[ranked] = np.repeat(blocks, trellis.BLOCK)[: len(energy)]
        if factors is None:
            break
        errors = np.array(ERRORS)[bits[order]]
        variance[order] = _fed_back(factors.feedback, errors, np.maximum(energy, 1e-12)[order])
    root = np.sqrt(variance)
    gain = float(root[bits > 0].max(initial=0.0)) or 1.0
    steps = np.rint(-trellis.SCALE_STEPS * np.log2(root / gain)).clip(0, trellis.SCALE_CODES - 1)
    codes = trellis.column_codes(bits, steps)
    return Coding(tuple(blocks.tolist()), order, bits, codes, gain)


def _fed_back(
    feedback: np.ndarray, errors: np.ndarray, energy: np.ndarray | None = None
) -> np.ndarray:
    """Mean squares of targets, (in,) in the order of coding: those of the weights and of what
    errors add, each a share of its own target. Without ``energy`` what errors of 1 add."""
    columns = len(errors)
    total = np.zeros(columns) if energy is None else energy.astype(np.float64)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        squares = np.square(feedback[first:last, first:])
        made = np.zeros(last - first)
        for i in range(last - first):
            made[i] = errors[first + i] * (1.0 if energy is None else total[first + i])
            total[first + i + 1 : last] += made[i] * squares[i, i + 1 : last - first]
        total[last:] += made @ squares[:, last - first :]
    return total


# ---- the choice -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EncodedTrellis:
    """A matrix in trellis codes.

    Attributes:
        packed: its payload, flat uint8.
        scale: (out,) float32 row scales as they come back from storage.
        squares: as those of :class:`pocketllm.encode.Encoded`.
    """

    packed: np.ndarray
    scale: np.ndarray
    squares: np.ndarray


def column_energy(
    parts: Iterable[np.ndarray], scale: np.ndarray, shift: np.ndarray | None
) -> np.ndarray:
    """Mean square of each column's weights, in units of the mean square of row scales, (in,)."""
    total, first = 0.0, 0
    for weight in parts:
        if shift is not None:
            weight = weight - shift[first : first + len(weight), None]
        first += len(weight)
        total = total + np.square(weight, dtype=np.float64).sum(0)
    whole = np.square(scale, dtype=np.float64).sum()
    return np.asarray(total / whole if whole > 0 else total)


def encode_trellis(
    parts: Callable[[], Iterable[np.ndarray]],
    scale: np.ndarray,
    shift: np.ndarray | None,
    coding: Coding,
    stored: dict[str, np.ndarray],
    hessian: np.ndarray | None,
    factors: Factors | None,
) -> EncodedTrellis:
    """Choose the codes of every column of a matrix.

    Args:
        parts: gives the matrix (out, in) in parts of whole segments, float32.
        scale: (out,) root mean square of each row.
        shift: (out,) of each row, or None.
        coding: of its columns.
        stored: the codec's tensors.
        hessian: (in, in), for the errors; None: plain ones alone.
        factors: of it, in blocks of one column; None: no feedback.

    Raises:
        PocketError: some of what is stored is infinite.
    """
    scale = rowcode.nearest(scale * np.float32(coding.gain), signed=False)
    order, codes = coding.order, coding.codes
    factor = np.ones(len(order), np.float32) if codes is None else trellis.column_scale(codes)
    columns = len(order)
    extra = trellis.block_bits(coding.bits, columns)[1]
    level = level_table(stored)
    # Where the columns as they are stored were chosen.
    chosen = np.argsort(order)
    if codes is not None:
        chosen = chosen[trellis.storage_order(codes)]
    packed, squares, first = [], np.zeros(4), 0
    heaviest = float(scale.max(initial=0.0)) or 1.0
    for weight in parts():
        rows = slice(first, first + len(weight))
        first = rows.stop
        own = None if shift is None else shift[rows]
        values = cut(weight, 1, scale[rows], own).values
        found = kernels.encode_trellis(
            np.take(values, order, axis=1),
            np.square(scale[rows] / np.float32(heaviest)),
            None if factors is None else factors.feedback,
            coding.column_bits[order].astype(np.uint8),
            extra,
            np.ascontiguousarray(factor[order]),
            level,
        )
        packed.append(trellis.pack(np.take(found, chosen, axis=1), coding.bits))
        made = decode(packed[-1], coding.bits, codes, stored, scale[rows], own, columns)
        squares += squares_of(weight, made, hessian, len(scale))
    return EncodedTrellis(np.concatenate(packed), scale, squares)


def decode(
    packed: np.ndarray,
    bits: trellis.Bits,
    codes: np.ndarray | None,
    stored: dict[str, np.ndarray],
    scale: np.ndarray,
    shift: np.ndarray | None,
    columns: int,
) -> np.ndarray:
    """The matrix (out, in) float32 that these codes stand for."""
    view, scale = trellis.view(
        stored["magnitude"], stored["magnitude_scale"], bits, scale, columns, codes
    )
    return kernels.decode_rows(packed, columns, 0, len(scale), view, scale, shift)
