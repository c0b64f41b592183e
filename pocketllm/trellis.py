"""Trellis codes: how the bits of such a matrix are stored, and what they mean (docs/FORMAT.md).

A weight has k bits. The first one of each weight enters a shift register that runs down the column;
three parities of the register's last nine bits and the weight's further bits are the index of its
level (trellis-coded quantisation: Marcellin and Fischer, IEEE Trans. Commun. 38, 1990; with tables
of its own for weights, QTIP, arXiv 2406.11235). All weights have the same bits, or each 128 columns
have bits of their own; then columns also have scales, and stand in the order of their bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .kernels import TrellisView

TAPS = (0x98, 0x56, 0x1B1)
MEMORY = 8
BLOCK = 128
SEGMENT = 256
SHORT = 16
MAX_BITS = 6
# Magnitudes of 1 to MAX_BITS bits together, and where those of k bits are.
MAGNITUDES = 252
TABLE = [slice((4 << k) - 4, (8 << k) - 4) for k in range(MAX_BITS)]
# The most that those of 1, 2, ... bits may be.
LARGEST = [63, 63, 127, 127, 127, 127]
# Rows in which bits may differ by one: quarters of a bit.
QUARTERS = 4
# Scales of columns are 2^(-code / SCALE_STEPS).
SCALE_STEPS, SCALE_CODES = 4, 32

# Bits of all weights, a multiple of 1/4, or of each block of columns in the order of storage.
Bits = float | tuple[int, ...]


def block_count(columns: int) -> int:
    """Blocks of BLOCK columns, the last one maybe shorter."""
    return -(-columns // BLOCK)


def block_bits(bits: Bits, columns: int) -> tuple[np.ndarray, int]:
    """Bits of each block, uint8, and of how many rows in four weights have one more."""
    if isinstance(bits, tuple):
        return np.array(bits, np.uint8), 0
    whole = math.floor(bits)
    return np.full(block_count(columns), whole, np.uint8), round((bits - whole) * QUARTERS)


def is_richer(extra: int, rows: int) -> np.ndarray:
    """Which rows have one bit more: (rows,) bool."""
    return np.diff(np.arange(rows + 1) * extra // QUARTERS).astype(bool)


def plane_columns(bits: Bits, columns: int, more: bool = False) -> list[int]:
    """How many columns the planes of a row have: plane p the p-th bits of the first columns."""
    blocks, _ = block_bits(bits, columns)
    blocks = np.where(blocks > 0, blocks + more, 0)
    return [min(columns, BLOCK * n) for p in range(MAX_BITS) if (n := int((blocks > p).sum()))]


def row_bytes(bits: Bits, columns: int, more: bool = False) -> int:
    """Bytes of a row: every plane fills whole bytes."""
    return sum(-(-n // 8) for n in plane_columns(bits, columns, more))


def payload_bytes(bits: Bits, rows: int, columns: int) -> int:
    """Bytes of all rows."""
    _, extra = block_bits(bits, columns)
    richer = rows * extra // QUARTERS
    few = (rows - richer) * row_bytes(bits, columns)
    return few + richer * row_bytes(bits, columns, True) if richer else few


def segments(rows: int) -> list[slice]:
    """The rows that each register runs through: SEGMENT, the last also what is left over."""
    count = max(1, rows // SEGMENT) if rows else 0
    ends = [SEGMENT * (i + 1) for i in range(count - 1)] + [rows]
    return [slice(SEGMENT * i, end) for i, end in enumerate(ends[:count])]


def pack(symbol: np.ndarray, bits: Bits) -> np.ndarray:
    """The payload of symbols (rows, columns) uint8, columns as they are stored: flat uint8."""
    rows, columns = symbol.shape
    richer = is_richer(block_bits(bits, columns)[1], rows)
    lines: list[np.ndarray] = [np.zeros(0, np.uint8)] * rows
    for more in (False, True):
        these = np.flatnonzero(richer == more)
        planes = [
            np.packbits(symbol[these, :n] >> p & 1, axis=1, bitorder="little")
            for p, n in enumerate(plane_columns(bits, columns, more))
        ]
        if len(these) and planes:
            packed = np.concatenate(planes, axis=1)
            if len(these) == rows:
                return packed.reshape(-1)
            for row, line in zip(these, packed, strict=True):
                lines[row] = line
    return np.concatenate(lines) if rows else np.zeros(0, np.uint8)


def has_spare_bits(packed: np.ndarray, bits: Bits, rows: int, columns: int) -> bool:
    """Is a bit set behind the last column of a plane?"""
    richer = is_richer(block_bits(bits, columns)[1], rows)
    sizes = np.where(richer, row_bytes(bits, columns, True), row_bytes(bits, columns))
    ends = np.cumsum(sizes)
    for more in (False, True):
        at = ends[richer == more] - row_bytes(bits, columns, more)
        for n in plane_columns(bits, columns, more):
            at = at + -(-n // 8)
            if n % 8 and len(at) and (packed[at - 1] >> (n % 8)).any():
                return True
    return False


def level_index(symbol: np.ndarray) -> np.ndarray:
    """Index of the level of every symbol (rows, columns): parities of the register and, from the
    fourth bit on, the symbol's further bits. int32.
    """
    window = np.zeros(symbol.shape, np.int32)
    first = symbol.astype(np.int32) & 1
    for part in segments(len(symbol)):
        rows = np.arange(part.start, part.stop)
        count = len(rows)
        for i in range(MEMORY + 1):
            before = rows - i
            there = before >= part.start
            if count >= SHORT:
                window[rows] |= first[np.where(there, before, before + count)] << i
            else:
                window[rows[there]] |= first[before[there]] << i
    index = symbol.astype(np.int32) >> 1 << len(TAPS)
    for place, taps in enumerate(TAPS):
        parity = window & taps
        for shift in (8, 4, 2, 1):
            parity ^= parity >> shift
        index |= (parity & 1) << place
    return index


def signed_magnitude(index: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the magnitudes of ``bits`` bits an index names, and its sign, 1 or -1."""
    half = 2 << bits
    negative = index >= half
    place = index % half
    return np.where(negative, half - 1 - place, place), np.where(negative, -1, 1)


def are_magnitudes(magnitude: np.ndarray) -> bool:
    """Are they all in their range?"""
    sizes = [own.stop - own.start for own in TABLE]
    return bool(((magnitude >= 0) & (magnitude <= np.repeat(LARGEST, sizes))).all())


def column_codes(bits: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """One byte a column, uint8: its bits (0..6) and the step of its scale (0..31)."""
    return (bits.astype(np.uint8) | scale.astype(np.uint8) << 3).astype(np.uint8)


def column_bits(codes: np.ndarray) -> np.ndarray:
    """Bits of each column, int64."""
    return codes.astype(np.int64) & 7


def column_scale(codes: np.ndarray) -> np.ndarray:
    """Scale of each column, float32."""
    return np.exp2(-(codes >> 3).astype(np.float64) / SCALE_STEPS).astype(np.float32)


def storage_order(codes: np.ndarray) -> np.ndarray:
    """The columns as they are stored: those with most bits first, otherwise in order. int32."""
    return np.argsort(-column_bits(codes), kind="stable").astype(np.int32)


def matches_blocks(codes: np.ndarray, blocks: Sequence[int]) -> bool:
    """Do the columns have the bits that their blocks are said to have?"""
    bits = np.repeat(np.array(blocks, np.int64), BLOCK)[: len(codes)]
    return bool((np.sort(column_bits(codes))[::-1] == bits).all())


def view(
    magnitude: np.ndarray,
    magnitude_scale: np.ndarray,
    bits: Bits,
    scale: np.ndarray,
    columns: int,
    codes: np.ndarray | None = None,
) -> tuple[TrellisView, np.ndarray]:
    """What the kernels take, and the row scales that go with it, float32 (out,).

    Args:
        magnitude: int8 (252,).
        magnitude_scale: float32 (6,), of the magnitudes of 1, 2, ... bits.
        bits: of the weights.
        scale: float32 (out,) of the rows.
        columns: in.
        codes: uint8 (in,), where blocks have bits of their own.
    """
    from .kernels import TrellisView

    blocks, extra = block_bits(bits, columns)
    magnitude = np.ascontiguousarray(magnitude)
    if codes is None:
        each = int(blocks[0]) + is_richer(extra, len(scale)).astype(np.int64)
        return TrellisView(blocks, extra, magnitude), scale * magnitude_scale[each - 1]
    order = storage_order(codes)
    steps = np.concatenate([np.zeros(1, np.float32), magnitude_scale])[column_bits(codes)]
    factor = np.ascontiguousarray((column_scale(codes) * steps)[order])
    return TrellisView(blocks, extra, magnitude, order, factor), scale
