"""Which codebook shape each matrix gets, so that the whole meets a budget of bits.

The shapes form a ladder of rates. Each matrix takes the rung that minimises its predicted error
plus a price on bits; the price is the one at which the total, every byte counted, fits the budget,
and what is left over buys the upgrades with the largest predicted gain per bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from .errors import PocketError
from .layout import Target
from .schema import CodecSpec, index_bits, row_stride_bytes
from .tensorfile import DTYPES

SCALE_BITS = 8
# The best d-dimensional quantiser of a Gaussian errs by g_d * 2^(-2R) at high rates R (Zador):
# g_d = 2 pi G_d ((d + 2) / d)^((d + 2) / 2) with G_d the second moment of the best lattice cell.
ZADOR_FACTOR = {1: 2.72, 2: 2.02, 4: 1.62, 8: 1.37}
# An error in the embedding reaches every layer, and the logits again where it is tied to the head.
EMBEDDING_SENSITIVITY = 8.0


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """A codebook shape: ``codewords`` K of ``subvector`` d values."""

    subvector: int
    codewords: int

    @property
    def index_bits(self) -> int:
        """b, bits of one packed index."""
        return index_bits(self.codewords)

    @property
    def rate(self) -> float:
        """Index bits per weight."""
        return self.index_bits / self.subvector


# d = 4 keeps the table in the first-level cache up to K = 4096; above 3 bits shorter ones do.
LADDER: tuple[Shape, ...] = (
    *(Shape(8, 2**b) for b in range(4, 8)),
    *(Shape(4, 2**b) for b in range(4, 13)),
    *(Shape(2, 2**b) for b in range(7, 13)),
    *(Shape(1, 2**b) for b in range(7, 9)),
)


def payload_bits(target: Target, shape: Shape, *, row_scale: bool, row_shift: bool) -> int:
    """Bits of a matrix's packed indices and row statistics (the table apart)."""
    if target.tied_to:
        return 0
    rows, columns = target.shape
    row_bytes = row_stride_bytes(columns, shape.subvector, shape.index_bits)
    return rows * 8 * row_bytes + (rows + 1) * SCALE_BITS * (int(row_scale) + int(row_shift))


def codec_bits(spec: CodecSpec) -> int:
    """Bits of one stored codec."""
    return sum(8 * DTYPES[dtype][0] * math.prod(shape) for dtype, shape in spec.tensors().values())


def predicted_error(shape: Shape) -> float:
    """Expected squared error per unit variance of a Gaussian source."""
    # At low rates the factor falls towards 1; this form follows Lloyd-Max within 6 % at d = 1.
    factor = 1 + (ZADOR_FACTOR[shape.subvector] - 1) * (1 - 2 ** (-shape.rate / 2))
    return float(factor * 4.0**-shape.rate)


def allocate(
    targets: Sequence[Target],
    budget_bits: float,
    *,
    spec_of: Callable[[Shape], CodecSpec],
    row_scale: bool = True,
    row_shift: bool = False,
    group_of: dict[str, str],
    ladder: Sequence[Shape] = LADDER,
) -> dict[str, Shape]:
    """Give every target a shape so that all bytes together stay within ``budget_bits``.

    Args:
        targets: what is compressed; tied targets cost nothing and follow their owner.
        budget_bits: bits for payloads, row statistics and tables together.
        spec_of: the codec that would be stored for a shape.
        group_of: target name -> name of the group that shares tables.

    Raises:
        PocketError: even the smallest shape does not fit; the sentence says what would.
    """
    owners = [t for t in targets if not t.tied_to]
    rungs = sorted(ladder, key=lambda s: s.rate)
    cost = {
        t.name: [payload_bits(t, s, row_scale=row_scale, row_shift=row_shift) for s in rungs]
        for t in owners
    }
    harm = {
        t.name: [_sensitivity(t) * t.weights * predicted_error(s) for s in rungs] for t in owners
    }

    table = [codec_bits(spec_of(s)) for s in rungs]

    def total(choice: dict[str, int]) -> float:
        tables = {(group_of[name], rung) for name, rung in choice.items()}
        return sum(cost[n][r] for n, r in choice.items()) + sum(table[r] for _, r in tables)

    def at_price(price: float) -> dict[str, int]:
        return {
            t.name: min(range(len(rungs)), key=lambda r: harm[t.name][r] + price * cost[t.name][r])
            for t in owners
        }

    smallest = {t.name: 0 for t in owners}
    if total(smallest) > budget_bits:
        weights = sum(t.weights for t in owners)
        least = total(smallest) / weights
        raise PocketError(
            f"bits: {budget_bits / weights:.3f} bits per weight cannot be met, "
            f"the least here is {least:.3f}: "
            f"ask for at least {math.ceil(least * 100) / 100:.2f}"
        )
    low, high = 1e-12, 1e3
    for _ in range(80):
        price = math.sqrt(low * high)
        if total(at_price(price)) > budget_bits:
            low = price
        else:
            high = price
    choice = at_price(high)
    if total(choice) > budget_bits:
        choice = smallest
    _spend_the_rest(choice, budget_bits, cost, harm, total)
    return {t.name: rungs[choice[t.tied_to or t.name]] for t in targets}


def _spend_the_rest(
    choice: dict[str, int],
    budget_bits: float,
    cost: dict[str, list[int]],
    harm: dict[str, list[float]],
    total: Callable[[dict[str, int]], float],
) -> None:
    """Move matrices up one rung, best predicted gain per bit first, while the budget allows."""

    def gain(name: str) -> float:
        rung = choice[name]
        return (harm[name][rung] - harm[name][rung + 1]) / max(
            1, cost[name][rung + 1] - cost[name][rung]
        )

    for name in sorted((n for n in choice if choice[n] + 1 < len(cost[n])), key=gain, reverse=True):
        choice[name] += 1
        if total(choice) > budget_bits:
            choice[name] -= 1


def _sensitivity(target: Target) -> float:
    return EMBEDDING_SENSITIVITY if target.kind == "embedding" else 1.0
