"""Which codebook shape or rate of trellis codes each matrix gets, to meet a budget of bits.

Shapes and rates form a ladder. Each matrix takes the rung that minimises the harm its predicted
error does (see :mod:`pocketllm.sensitivity`) plus a price on bits; the price is the one at which
the total, every byte counted, fits the budget. Rungs that do not pay for their tables are left out,
and what is left over buys the upgrades with the largest predicted gain per bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import trellis
from .errors import PocketError
from .layout import Target
from .schema import CodecSpec, index_bits, row_stride_bytes
from .tensorfile import DTYPES
from .trellis_bits import Sharing, expected_error

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


@dataclasses.dataclass(frozen=True, order=True)
class Rate:
    """Trellis codes of so many quarters of a bit a weight."""

    quarters: int

    @property
    def rate(self) -> float:
        """Bits per weight."""
        return self.quarters / trellis.QUARTERS

    def row_bytes(self, columns: int) -> int:
        """The most that a row may take where blocks of columns have bits of their own."""
        return self.quarters * columns // (8 * trellis.QUARTERS)


Rung = Shape | Rate

# d = 4 keeps the table in the first-level cache up to K = 4096; above 3 bits shorter ones do.
LADDER: tuple[Shape, ...] = (
    *(Shape(8, 2**b) for b in range(4, 8)),
    *(Shape(4, 2**b) for b in range(4, 13)),
    *(Shape(2, 2**b) for b in range(7, 13)),
    *(Shape(1, 2**b) for b in range(7, 9)),
)
# Tables small enough to be looked up in registers; some are fetched as fast, in pairs, on AVX2.
FAST_LADDER: tuple[Shape, ...] = (
    *(Shape(8, 2**b) for b in range(4, 6)),
    *(Shape(4, 2**b) for b in range(3, 9)),
    *(Shape(2, 2**b) for b in range(5, 9)),
    *(Shape(1, 2**b) for b in range(5, 9)),
)
# Shapes of tables that may be K / 2^d rows of magnitudes with all their signs: so many fewer rows
# are looked up. For normal values they err so many times as much as K free rows.
SYMMETRIC_ERROR: dict[Shape, float] = {
    Shape(4, 128): 1.09,
    Shape(4, 256): 1.07,
    Shape(2, 64): 1.025,
    Shape(2, 128): 1.012,
    Shape(2, 256): 1.0,
    **{Shape(1, 2**b): 1.0 for b in range(5, 9)},
}
# Trellis codes have at least a bit and at most six.
TRELLIS_LADDER: tuple[Rung, ...] = (
    *(Shape(8, 2**b) for b in range(4, 8)),
    *(Rate(q) for q in range(trellis.QUARTERS, trellis.QUARTERS * trellis.MAX_BITS + 1)),
    *(Shape(1, 2**b) for b in range(7, 9)),
)
LADDERS: dict[str, tuple[Rung, ...]] = {
    "quality": LADDER,
    "speed": FAST_LADDER,
    "trellis": TRELLIS_LADDER,
}


def payload_bits(
    target: Target,
    rung: Rung,
    *,
    row_scale: bool,
    row_shift: bool,
    shares: Sharing | None = None,
) -> int:
    """Bits of a matrix's packed indices or codes and statistics (the table apart).

    ``shares`` are those of its columns, where their blocks have bits of their own.
    """
    if target.tied_to:
        return 0
    rows, columns = target.shape
    statistics = (rows + 1) * SCALE_BITS * (int(row_scale) + int(row_shift))
    if isinstance(rung, Shape):
        row_bytes = row_stride_bytes(columns, rung.subvector, rung.index_bits)
        return rows * 8 * row_bytes + statistics
    bits: trellis.Bits = rung.rate
    if shares is not None:
        bits = tuple(shares.bits(rung.row_bytes(columns)).tolist())
        statistics += 8 * columns
    return 8 * trellis.payload_bytes(bits, rows, columns) + statistics


def codec_bits(spec: CodecSpec) -> int:
    """Bits of one stored codec."""
    return sum(8 * DTYPES[dtype][0] * math.prod(shape) for dtype, shape in spec.tensors().values())


def is_symmetric(prefer: str, shape: Shape) -> bool:
    """Does a table of this shape hold magnitudes with all their signs, where weights allow it?"""
    return shape in SYMMETRIC_ERROR and (prefer == "speed" or SYMMETRIC_ERROR[shape] == 1)


def predicted_error(shape: Rung, prefer: str = "quality") -> float:
    """Expected squared error per unit variance of a Gaussian source."""
    if isinstance(shape, Rate):
        return expected_error(shape.rate)
    # At low rates the factor falls towards 1; this form follows Lloyd-Max within 6 % at d = 1.
    factor = 1 + (ZADOR_FACTOR[shape.subvector] - 1) * (1 - 2 ** (-shape.rate / 2))
    if is_symmetric(prefer, shape):
        factor *= SYMMETRIC_ERROR[shape]
    return float(factor * 4.0**-shape.rate)


def allocate(
    targets: Sequence[Target],
    budget_bits: float,
    *,
    spec_of: Callable[[Rung], CodecSpec],
    row_scale: bool = True,
    row_shift: bool = False,
    groups_of: Callable[[Mapping[str, Rung]], Mapping[str, str]],
    harm_of: Mapping[str, float] | None = None,
    shares_of: Mapping[str, Sharing] | None = None,
    ladder: str = "quality",
) -> dict[str, Rung]:
    """Give every target a shape or rate so that all bytes together stay within ``budget_bits``.

    Args:
        targets: what is compressed; tied targets cost nothing and follow their owner.
        budget_bits: bits for payloads, row statistics and tables together.
        spec_of: the codec that would be stored for a shape or rate.
        groups_of: for the shapes of all targets, target name -> name of the group it shares a table
            with.
        harm_of: target name -> harm of a relative squared error of 1; None: as many as it has
            weights, in embeddings eight times that.
        shares_of: names of the targets whose blocks of columns have bits of their own in trellis
            codes -> how they share them, their harm about 1 in all.
        ladder: which, ``"quality"``, ``"speed"`` or ``"trellis"``.

    Raises:
        PocketError: even the smallest shape does not fit; the sentence says what would.
    """
    owners = [t for t in targets if not t.tied_to]
    rungs = sorted(LADDERS[ladder], key=lambda s: s.rate)
    shares = shares_of or {}

    def cost(target: Target, rung: Rung) -> int:
        return payload_bits(
            target,
            rung,
            row_scale=row_scale,
            row_shift=row_shift,
            shares=shares.get(target.name),
        )

    problem = _Problem(
        names=[t.name for t in owners],
        rungs=rungs,
        cost=np.array([[cost(t, s) for s in rungs] for t in owners], np.float64),
        harm=_harm(owners, rungs, ladder, harm_of, shares),
        table=[codec_bits(spec_of(s)) for s in rungs],
        groups_of=groups_of,
        budget=budget_bits,
    )
    smallest = np.isfinite(problem.harm).argmax(1)
    if problem.bits(smallest) > budget_bits:
        weights = sum(t.weights for t in owners)
        least = problem.bits(smallest) / weights
        raise PocketError(
            f"bits: {budget_bits / weights:.3f} bits per weight cannot be met, "
            f"the least here is {least:.3f}: "
            f"ask for at least {math.ceil(least * 100) / 100:.2f}"
        )
    value, best = problem.solve(list(range(len(problem.rungs))))
    choices = [smallest] if best is None else [_without_costly_tables(problem, value, best), best]
    choice = min((_spend_the_rest(problem, c) for c in choices), key=problem.total_harm)
    found = dict(zip(problem.names, choice, strict=True))
    return {t.name: rungs[found[t.tied_to or t.name]] for t in targets}


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What each rung costs each matrix; a choice is an array of rungs, one for each name.

    Attributes:
        cost: (matrices, rungs), payload bits.
        harm: (matrices, rungs), predicted; infinite where the rung is not allowed.
        table: bits of a table of each rung.
    """

    names: list[str]
    rungs: list[Rung]
    cost: np.ndarray
    harm: np.ndarray
    table: list[int]
    groups_of: Callable[[Mapping[str, Rung]], Mapping[str, str]]
    budget: float

    def bits(self, choice: np.ndarray) -> float:
        """Everything a choice stores; all rates share one table."""
        shapes = {n: self.rungs[r] for n, r in zip(self.names, choice, strict=True)}
        groups = self.groups_of(shapes)
        tables = {
            (groups[n], None if isinstance(shapes[n], Rate) else r): self.table[r]
            for n, r in zip(self.names, choice.tolist(), strict=True)
        }
        payload = self.cost[np.arange(len(choice)), choice].sum()
        return float(payload) + sum(tables.values())

    def total_harm(self, choice: np.ndarray) -> float:
        """That of all matrices."""
        return float(self.harm[np.arange(len(choice)), choice].sum())

    def solve(self, rungs: list[int]) -> tuple[float, np.ndarray | None]:
        """The best choice of these rungs within the budget, and the value of its Lagrangian;
        infinity and None where none fits."""
        harm, cost = self.harm[:, rungs], self.cost[:, rungs]
        if np.isinf(harm).all(1).any():
            return math.inf, None
        low, high, best = 1e-12, 1e3, None
        for _ in range(50):
            price = math.sqrt(low * high)
            choice = np.array(rungs)[(harm + price * cost).argmin(1)]
            if self.bits(choice) > self.budget:
                low = price
            else:
                high, best = price, choice
        if best is None:
            return math.inf, None
        return self.total_harm(best) + high * (self.bits(best) - self.budget), best


def _without_costly_tables(problem: _Problem, value: float, choice: np.ndarray) -> np.ndarray:
    """The choice, or a better one of as few rungs as pay for their tables.

    Lagrangians compare what choices would cost if all of the budget could be spent; where a rung is
    missing for that they promise too much.
    """
    while len(used := sorted(set(choice.tolist()))) > 1:
        fewer = [problem.solve([r for r in used if r != gone]) for gone in used]
        least, best = min(fewer, key=lambda found: found[0])
        if best is None or least > value:
            break
        value, choice = least, best
    return choice


def _spend_the_rest(problem: _Problem, choice: np.ndarray) -> np.ndarray:
    """Move matrices up to the next rung in use (the top ones to the next of all), best gain per bit
    first, while the budget allows."""
    used = sorted(set(choice.tolist()))
    gains = []
    for i, now in enumerate(choice.tolist()):
        higher = [r for r in range(now + 1, len(problem.rungs)) if np.isfinite(problem.harm[i, r])]
        then = next((r for r in higher if r in used), higher[0] if higher else None)
        if then is not None:
            less = problem.harm[i, now] - problem.harm[i, then]
            gains.append((less / max(1.0, problem.cost[i, then] - problem.cost[i, now]), i, then))
    for _, i, then in sorted(gains, key=lambda gain: gain[0], reverse=True):
        moved = choice.copy()
        moved[i] = then
        if problem.bits(moved) <= problem.budget:
            choice = moved
    return choice


def _harm(
    owners: Sequence[Target],
    rungs: Sequence[Rung],
    ladder: str,
    harm_of: Mapping[str, float] | None,
    shares: Mapping[str, Sharing],
) -> np.ndarray:
    """(matrices, rungs): predicted, on average as large as the errors of all weights."""
    whole = np.array(
        [harm_of[t.name] if harm_of else _prior(t) * t.weights for t in owners], np.float64
    )
    whole *= sum(t.weights for t in owners) / whole.sum()
    harm = whole[:, None] * np.array([predicted_error(s, ladder) for s in rungs])
    for i, target in enumerate(owners):
        for r, shape in enumerate(rungs):
            if isinstance(shape, Rate):
                if target.name in shares:
                    row_bytes = shape.row_bytes(target.shape[1])
                    harm[i, r] = whole[i] * shares[target.name].error(row_bytes)
                continue
            # A codebook for a matrix alone must find as many sub-vectors in it.
            if r and shape.codewords * shape.subvector > target.weights:
                harm[i, r] = np.inf
    return harm


def _prior(target: Target) -> float:
    return EMBEDDING_SENSITIVITY if target.kind == "embedding" else 1.0
