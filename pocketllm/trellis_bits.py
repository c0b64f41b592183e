"""What trellis codes of some bits err, and how columns share bits: arithmetic of plans."""

from __future__ import annotations

import heapq

import numpy as np

from . import trellis

# Squared error of normal values of variance 1, of 0, 1, 2, ... bits, in long segments.
ERRORS = (1.0, 0.275, 0.0738, 0.0200, 0.00527, 0.00137, 0.00042)


def expected_error(bits: float) -> float:
    """Squared error of normal values of variance 1, of bits that are a multiple of 1/4."""
    if bits >= trellis.MAX_BITS:
        return ERRORS[-1]
    low = int(bits)
    return float(ERRORS[low] * (ERRORS[low + 1] / ERRORS[low]) ** (bits - low))


def share_bits(harm: np.ndarray, row_bytes: int) -> np.ndarray:
    """Bits of blocks that cost least within ``row_bytes`` bytes a row.

    Args:
        harm: (columns,) what an error of the column's own variance costs, falling.
        row_bytes: of all planes.

    Returns:
        (blocks,) int64, never rising.
    """
    firsts = np.arange(0, len(harm), trellis.BLOCK)
    whole = np.add.reduceat(harm, firsts)
    size = -(-np.minimum(len(harm) - firsts, trellis.BLOCK) // 8)
    bits = np.zeros(len(firsts), np.int64)
    left = row_bytes

    def offer(block: int) -> tuple[float, int]:
        now = bits[block]
        less = ERRORS[now] - ERRORS[now + 1]
        return -whole[block] * less / size[block], block

    offers = [offer(block) for block in range(len(firsts))]
    heapq.heapify(offers)
    while offers:
        _, block = heapq.heappop(offers)
        if size[block] > left:
            break
        left -= int(size[block])
        bits[block] += 1
        if bits[block] < trellis.MAX_BITS:
            heapq.heappush(offers, offer(block))
    return np.minimum.accumulate(bits)


class Sharing:
    """How blocks of a matrix's columns share bits, for any bytes a row.

    Attributes:
        harm: (columns,) what an error of each column's own variance costs, falling.
    """

    def __init__(self, harm: np.ndarray) -> None:
        """``harm`` may be in any order."""
        self.harm = np.sort(harm)[::-1]
        self._bits: dict[int, np.ndarray] = {}

    def bits(self, row_bytes: int) -> np.ndarray:
        """Those of :func:`share_bits`, found once."""
        if row_bytes not in self._bits:
            self._bits[row_bytes] = share_bits(self.harm, row_bytes)
        return self._bits[row_bytes]

    def error(self, row_bytes: int) -> float:
        """What columns then cost together."""
        each = np.repeat(self.bits(row_bytes), trellis.BLOCK)[: len(self.harm)]
        return float((self.harm * np.array(ERRORS)[each]).sum())
